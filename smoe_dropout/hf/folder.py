"""Files of a saved model, in a folder or a repository of the hub, of which the manifest says which belong together.

A folder without a manifest was written by transformers: by `model.save_pretrained` or its Trainer.
"""

import os
import re
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.utils.hub import cached_file

from smoe_dropout.files import read_object
from smoe_dropout.manifest import MANIFEST, hashes, require_name, verified
from smoe_dropout.options import ConfigError

CONFIG, GENERATION = "config.json", "generation_config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
OLD_WEIGHTS = "experts.safetensors"  # of version 0.1
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
ADAPTER = "adapter_config.json"  # of peft; transformers would apply the adapter without a word
DISTRIBUTED = re.compile(r"shard-\d{5}-.*\.safetensors")  # which transformers would read in place of the weights
HUB = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


def is_part(name: str) -> bool:
    """Return whether a file of this name holds a part of a model that transformers reads."""
    return name in (CONFIG, GENERATION, WEIGHTS, INDEX, OLD_WEIGHTS) or SHARD.fullmatch(name) is not None


class Files:
    """Files of a saved model.

    source: a folder or the id of a repository. named: arguments of from_pretrained, of which those that concern the hub are used. Raises
    ConfigError for an interrupted save, and for files that belong to another one.
    """

    def __init__(self, source: str | os.PathLike, named: dict[str, Any]):
        self.source, self.hub = str(source), {name: named[name] for name in HUB if named.get(name) is not None}
        self.folder = Path(self.source, self.hub.get("subfolder", "")) if os.path.isdir(self.source) else None
        self.found: dict[str, Path | None] = {}
        manifest = self.find(MANIFEST)
        self.hashes = {} if manifest is None else _hashes(manifest)
        known = self.hashes or (WEIGHTS, INDEX)
        self.weights = next((name for name in (OLD_WEIGHTS, WEIGHTS, INDEX) if name in known and self.find(name)), None)
        here = [] if self.folder is None else sorted(path.name for path in self.folder.iterdir())
        if manifest is not None and (foreign := [name for name in here if is_part(name) and name not in self.hashes]):
            raise ConfigError(f"{self.path(foreign[0])} is not part of the save: remove it")
        if others := [name for name in here if DISTRIBUTED.fullmatch(name)] + [ADAPTER] * (self.find(ADAPTER) is not None):
            raise ConfigError(f"{self.path(others[0])} changes the weights of the model: move it to a folder of its own")
        if missing := [name for name in self.hashes if self.find(name) is None]:
            raise ConfigError(f"{self.path(missing[0])} is missing")
        if self.weights is None:
            raise ConfigError(f"{self.source} has neither {MANIFEST} nor {WEIGHTS}: an interrupted save, or not a model folder")
        self.places = _places(self.find(INDEX)) if self.weights == INDEX else {}
        self.shards = sorted(set(self.places.values())) or [self.weights]
        if missing := [name for name in self.shards if self.find(name) is None]:
            raise ConfigError(f"{self.path(missing[0])} is missing")

    def path(self, name: str) -> Path:
        """Where a file is or would be, for messages."""
        return (self.folder or Path(self.source)) / name

    def find(self, name: str) -> Path | None:
        """The file, downloaded if needed; None if there is none of this name."""
        if self.folder is not None:
            return self.folder / name if (self.folder / name).is_file() else None
        if name not in self.found:
            found = cached_file(
                self.source, name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False, **self.hub
            )
            self.found[name] = None if found is None else Path(found)
        return self.found[name]

    def verified(self) -> AbstractContextManager[None]:
        """Context manager that compares all files with the manifest. ConfigError naming the file that differs, in place of other errors."""
        return verified(self.hashes, self.folder or Path(self.source), self.find)

    def unreadable(self) -> str | None:
        """Sentence about the first weight file that cannot be read, if there is one."""
        for name in self.shards:
            try:
                with safe_open(self.find(name), "pt"):
                    pass
            except (OSError, SafetensorError, ValueError, KeyError) as error:
                return f"{self.path(name)} cannot be read: {error}"
        return None

    def dtypes(self) -> dict[str, str]:
        """Precision of each stored tensor in the words of safetensors, by its name in the file."""
        found = {}
        for name in self.shards:
            with safe_open(self.find(name), "pt") as file:
                found |= {tensor: file.get_slice(tensor).get_dtype() for tensor in file.keys()}  # noqa: SIM118
        return found

    def where(self, tensor: str) -> Path:
        """File of a tensor, or the index of the files if none of them has it."""
        return self.path(self.places.get(tensor, self.weights))


def _hashes(manifest: Path) -> dict[str, str]:
    found = hashes(manifest)
    if CONFIG not in found or {WEIGHTS, INDEX, OLD_WEIGHTS}.isdisjoint(found):
        raise ConfigError(f"{manifest} does not describe a complete save of save_pretrained: save again")
    return found


def _places(index: Path) -> dict[str, str]:
    """File of each tensor."""
    stored = read_object(index)
    places = stored.get("weight_map")
    if not isinstance(places, dict) or not isinstance(stored.get("metadata"), dict):
        raise ConfigError(f"{index} is damaged: weight_map or metadata is missing")
    for name in places.values():
        require_name(name, index)
        if not name.endswith(".safetensors"):
            raise ConfigError(f"{index} is damaged: {name!r} is not a safetensors file")
    return places
