"""Room on a disk, before anything large is written."""

import shutil
from pathlib import Path

from utils.errors import UserError

SPACE_MARGIN = 16 << 20  # bytes of disk left free


def require_space(folder: Path, size: int, flag: str = "--out") -> None:
    """Raise UserError unless the disk of `folder` has room for `size` bytes; the remedy is another folder by `flag`."""
    free, needed = shutil.disk_usage(folder).free, size + SPACE_MARGIN
    if free < needed:
        folder = folder.parent if folder.suffix == ".tmp" else folder  # one that is being built has a name of its own
        raise UserError(f"{folder} has {free / 1e6:,.0f} MB free, {needed / 1e6:,.0f} MB are needed: make room, or choose another {flag}")
