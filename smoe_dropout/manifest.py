"""Folders of a saved model with a manifest, the sha256 of each file: a save that was interrupted is recognised as incomplete.

A save is written to a room, a folder inside the one it goes to, and moved. Meanwhile its manifest says that the save is incomplete.
"""

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from smoe_dropout.files import read_object, set_mode
from smoe_dropout.folders import held, remove, temporary
from smoe_dropout.options import ConfigError

MANIFEST = "manifest.json"
ROOM, LOCKED = ".saving-", ".saving-locked-"  # a room of this version is locked by the process that uses it
ABANDONED = 3600  # seconds after which a room that is not locked, of an older version, counts as left behind
SMALL = 1 << 20  # bytes of a file that is hashed at once


def hashes(path: Path) -> dict[str, str]:
    """The sha256 of each file by its name in the folder. ConfigError for an interrupted save, and for a damaged manifest."""
    stored = read_object(path)
    found = stored.get("sha256")
    if stored.get("complete") is not True or not isinstance(found, dict):
        raise ConfigError(f"{path} does not describe a complete save: an interrupted one; save again")
    for name, digest in found.items():
        require_name(name, path)
        if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
            raise ConfigError(f"{path} is damaged: {name!r} has no sha256")
    if stored.get("checksum", checksum(found)) != checksum(found):  # older manifests have none
        raise ConfigError(f"{path} is damaged: its content does not match its checksum; restore it from a copy, or save the model again")
    return found


def checksum(found: Mapping[str, str]) -> str:
    """Hash of the names and hashes in a manifest."""
    return hashlib.sha256(json.dumps(dict(found), sort_keys=True).encode()).hexdigest()


def require_name(name: Any, source: Path) -> None:
    """Raise ConfigError unless this, read from `source`, is the name of a file in the same folder, and no path."""
    if not isinstance(name, str) or not name or name in (".", "..") or re.search(r"[/\\:\0]", name):
        raise ConfigError(f"{source} is damaged: {name!r} is not the name of a file in its folder")


@contextmanager
def verified(known: Mapping[str, str], source: Path, find: Callable[[str], Path | None]) -> Iterator[None]:
    """Compare files with their hashes: small ones first, the others while the body runs.

    source: where messages say that the files are. find: gives the place of a file. Raises ConfigError naming the file that is missing or
    differs, in place of the body's errors.
    """
    places = {name: find(name) for name in known}
    if missing := [name for name, place in places.items() if place is None]:
        raise ConfigError(f"{source / missing[0]} is missing, which {MANIFEST} lists: the save is incomplete")
    small = {name for name, place in places.items() if place.stat().st_size <= SMALL}
    _refuse(_differing(known, places, small), source)
    with ThreadPoolExecutor(1) as pool:
        differing = pool.submit(_differing, known, places, known.keys() - small)
        try:
            yield
        except Exception:
            _refuse(differing.result(), source)
            raise
        _refuse(differing.result(), source)


def _differing(known: Mapping[str, str], places: Mapping[str, Path], names: Iterable[str]) -> str | None:
    return next((name for name in sorted(names) if sha256(places[name]) != known[name]), None)


def _refuse(name: str | None, source: Path) -> None:
    if name is not None:
        raise ConfigError(f"{source / name} is damaged or modified: its sha256 differs from {MANIFEST}") from None


@contextmanager
def room(folder: Path) -> Iterator[Path]:
    """An empty folder inside `folder`, which is created if needed; removed afterwards, as are those that killed processes left."""
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(f"{ROOM}*"):
        _remove_abandoned(left)
    with temporary(folder, LOCKED) as made:
        yield made


def _remove_abandoned(left: Path) -> None:
    """Remove a room unless a living process may use it."""
    try:
        if not left.name.startswith(LOCKED):
            if time.time() - max(path.stat().st_mtime for path in (left, *left.iterdir())) > ABANDONED:
                shutil.rmtree(left)
            return
        with held(left) as free:
            if free:
                remove(left)
    except OSError:  # gone, not a folder, or of another user
        return


def publish(made: Path, folder: Path, earlier: Iterable[str]) -> None:
    """Move the files of a save into the folder and remove those of an `earlier` one, whose manifest is replaced first and last."""
    names = sorted(path.name for path in made.iterdir())
    _write(made / MANIFEST, {"complete": False})
    mode = (made / MANIFEST).stat().st_mode
    for name in names:
        set_mode(made / name, mode)  # safetensors, by which transformers writes, lets only the owner read
        with (made / name).open("rb") as file:
            os.fsync(file.fileno())
    found = {name: sha256(made / name) for name in names}
    os.replace(made / MANIFEST, folder / MANIFEST)
    for name in set(earlier) - set(names):
        (folder / name).unlink(missing_ok=True)
    for name in names:
        os.replace(made / name, folder / name)
    _write(made / MANIFEST, {"complete": True, "sha256": found, "checksum": checksum(found)})
    os.replace(made / MANIFEST, folder / MANIFEST)


def _write(path: Path, values: dict[str, Any]) -> None:
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
