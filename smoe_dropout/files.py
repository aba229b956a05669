"""Files: JSON from outside is read with limits on its size and depth, and one kind of error for each direction."""

import json
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from smoe_dropout.options import ConfigError

LARGEST, DEEPEST = 64 << 20, 64  # bytes of a JSON file, and levels of lists and objects in it


def read_json(path: str | os.PathLike) -> Any:
    """Contents of a JSON file. ConfigError if it is missing, unreadable, too large, nested too deeply or not JSON in UTF-8."""
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            raise ConfigError(f"{path} is not a file")
        with path.open("rb") as file:
            content = file.read(LARGEST + 1)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror or error})") from None
    return parse_json(content, path)


def read_object(path: str | os.PathLike) -> dict[str, Any]:
    """Contents of a JSON file with an object. ConfigError as for `read_json`."""
    if not isinstance(found := read_json(path), dict):
        raise ConfigError(f"{path} is damaged: not a JSON object")
    return found


def parse_json(content: bytes | str, source: str | os.PathLike) -> Any:
    """Value of a JSON text; `source` says in messages where it comes from. ConfigError as for `read_json`."""
    if len(content) > LARGEST:
        raise ConfigError(f"{source} is larger than {LARGEST >> 20} MB, too large for what it should hold")
    try:
        text = content.decode("utf-8-sig") if isinstance(content, bytes) else content
        value = json.loads(text)
        if "\\ud" in text or "\\uD" in text:
            json.dumps(value, ensure_ascii=False).encode()  # half a pair of surrogates is no text
        too_deep = _exceeds(value, DEEPEST)
    except RecursionError:
        too_deep = True
    except ValueError as error:  # not JSON, or not UTF-8
        raise ConfigError(f"{source} is not readable as JSON ({error})") from None
    if too_deep:
        raise ConfigError(f"{source} is nested deeper than {DEEPEST} levels")
    return value


@contextmanager
def writing_tensors(path: Path) -> Iterator[None]:
    """Context manager for writing a safetensors file: OSError with its path, in place of the error of safetensors, if that fails.

    The file gets the mode of one that is opened for writing, while safetensors lets only its owner read it.
    """
    from safetensors import SafetensorError

    if is_new := not path.exists():
        path.touch()
    mode = path.stat().st_mode
    try:
        yield
    except BaseException as error:
        if is_new:
            path.unlink(missing_ok=True)
        if isinstance(error, SafetensorError) and (number := re.search(r"os error (\d+)", str(error))):
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None
        raise
    set_mode(path, mode)


def set_mode(path: Path, mode: int) -> None:
    """Set who may read and write a file, where the file system knows of that."""
    with suppress(OSError):
        path.chmod(stat.S_IMODE(mode))


def _exceeds(value: Any, levels: int) -> bool:
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(levels == 0 or _exceeds(child, levels - 1) for child in children if isinstance(child, dict | list))
