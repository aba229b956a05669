"""Registration with transformers as soon as that library is imported, by whomever. Imports neither torch nor transformers."""

from __future__ import annotations

import importlib
import sys
import warnings

TYPE_CHECKING = False  # not from typing, whose import takes longer than that of this library
if TYPE_CHECKING:
    from collections.abc import Callable
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any


class AfterImport:
    """Finder on sys.meta_path that leaves finding to the others and calls `then` once the module has been executed."""

    def __init__(self, name: str, then: Callable[[], None]):
        self.name, self.then, self.finding = name, then, False

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """The spec that the other finders give, whose loader also calls `then`."""
        if fullname != self.name or self.finding:
            return None
        from importlib.util import find_spec

        self.finding = True
        try:
            spec = find_spec(fullname)
        finally:
            self.finding = False
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                self.then()

            spec.loader.exec_module = exec_module
        return spec


def when_imported(name: str, then: Callable[[], None]) -> None:
    """Call `then` now if the module has been imported, and otherwise right after its import."""
    if name in sys.modules:
        then()
    else:
        sys.meta_path.insert(0, AfterImport(name, then))


def register() -> None:
    """Make transformers recognise converted models: its auto classes, and its model classes given their configuration."""
    when_imported("transformers.models.auto.configuration_auto", lambda: _import("smoe_dropout.hf.auto"))
    when_imported("transformers.modeling_utils", lambda: _import("smoe_dropout.hf.guards"))


def _import(name: str) -> None:
    try:
        importlib.import_module(name)
    except (ImportError, AttributeError) as error:  # must not break the import of transformers
        warnings.warn(f"models with experts cannot be saved or loaded with this version of transformers: {error}", stacklevel=2)
