"""Files of a saved model, in a folder or a repository of the hub, and the manifest that says which belong together.

The manifest has the sha256 of every file of a save. A folder without one was written by transformers: by `model.save_pretrained` or its
Trainer.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.utils.hub import cached_file

from smoe_dropout.options import ConfigError

CONFIG, GENERATION, MANIFEST = "config.json", "generation_config.json", "manifest.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
OLD_WEIGHTS = "experts.safetensors"  # of version 0.1
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
HUB = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


def is_part(name: str) -> bool:
    """Whether a file of this name holds a part of a model that transformers reads."""
    return name in (CONFIG, GENERATION, WEIGHTS, INDEX, OLD_WEIGHTS) or SHARD.fullmatch(name) is not None


class Files:
    """Files of a saved model.

    source: a folder or the id of a repository. named: arguments of from_pretrained, of which those that concern the hub are used. Raises
    ConfigError for an interrupted save, and for files that belong to another one.
    """

    def __init__(self, source: str | os.PathLike, named: dict[str, Any]):
        self.source, self.hub = str(source), {name: named[name] for name in HUB if named.get(name) is not None}
        self.folder = Path(self.source, self.hub.get("subfolder", "")) if os.path.isdir(self.source) else None
        manifest = self.find(MANIFEST)
        self.hashes = {} if manifest is None else _hashes(manifest)
        known = self.hashes or (WEIGHTS, INDEX)
        self.weights = next((name for name in (OLD_WEIGHTS, WEIGHTS, INDEX) if name in known and self.find(name)), None)
        if manifest is not None and self.folder is not None:
            here = sorted(path.name for path in self.folder.iterdir())
            if foreign := [name for name in here if is_part(name) and name not in self.hashes]:
                raise ConfigError(f"{self.folder / foreign[0]} is not part of the save: remove it")
        if missing := [name for name in self.hashes if self.find(name) is None]:
            raise ConfigError(f"{self.path(missing[0])} is missing")
        if self.weights is None:
            raise ConfigError(f"{self.source} has neither {MANIFEST} nor {WEIGHTS}: an interrupted save, or not a model folder")
        self.places = read_json(self.find(INDEX)).get("weight_map", {}) if self.weights == INDEX else {}
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
        found = cached_file(
            self.source, name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False, **self.hub
        )
        return None if found is None else Path(found)

    @contextmanager
    def verified(self) -> Iterator[None]:
        """Compare all files with the manifest while the body runs. ConfigError naming the file that differs, in place of other errors."""
        with ThreadPoolExecutor(1) as pool:
            differing = pool.submit(lambda: next((name for name, sha in self.hashes.items() if sha256(self.find(name)) != sha), None))
            try:
                yield
            except Exception:
                self._refuse(differing.result())
                raise
            self._refuse(differing.result())

    def _refuse(self, differing: str | None) -> None:
        if differing is not None:
            raise ConfigError(f"{self.path(differing)} is damaged or modified: its sha256 differs from {MANIFEST}") from None

    def unreadable(self) -> str | None:
        """Sentence about the first weight file that cannot be read, if there is one."""
        for name in self.shards:
            try:
                with safe_open(self.find(name), "pt"):
                    pass
            except (OSError, SafetensorError) as error:
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
    stored = read_json(manifest)
    hashes = stored.get("sha256")
    if (
        stored.get("complete") is not True
        or not isinstance(hashes, dict)
        or CONFIG not in hashes
        or {WEIGHTS, INDEX, OLD_WEIGHTS}.isdisjoint(hashes)
    ):
        raise ConfigError(f"{manifest} does not describe a complete save: an interrupted one; save again")
    return hashes


def read_json(path: Path) -> dict[str, Any]:
    """Contents of a JSON file. ConfigError if it cannot be read or is not an object."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path} is damaged: not a JSON object")
    return found


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a JSON file, down to the disk."""
    with path.open("w") as file:
        json.dump(values, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def sha256(path: Path) -> str:
    """Hash of a file's contents, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
