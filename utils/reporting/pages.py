"""Files that reports write, each replaced atomically; in a page, what is rendered stands between two markers."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from utils import documents
from utils.errors import UserError


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Yields the file to write, behind links, in a folder that is made for it. UserError if it cannot be written; nothing is left then."""
    made: list[Path] = []
    try:
        made = [folder for folder in path.parents if not folder.exists()]
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():
            raise UserError(f"{path} is not a file: choose another place")
        yield path.resolve() if path.is_symlink() else path
    except (OSError, RuntimeError) as error:  # RuntimeError: a circle of links
        for folder in made:
            with suppress(OSError):
                folder.rmdir()
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path} cannot be written ({reason}): choose another place, or make this one writable") from None


def update_page(path: Path, name: str, text: str) -> None:
    """Puts `text` between the two markers of `name` and leaves every other byte as it is."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before = read_page(path)
    if before.count(begin) != 1 or before.count(end) != 1 or before.index(begin) > before.index(end):
        raise UserError(f"{path}: needs the lines '{begin}' and '{end}', once each and in this order, around what is rendered")
    head, tail = before[: before.index(begin) + len(begin)], before[before.index(end) :]
    with writing(path) as file:
        documents.replace(file, f"{head}\n{text}\n{tail}".encode())


def read_page(path: Path) -> str:
    """The content of a page. UserError if it cannot be read or is not UTF-8."""
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path} is not a file: give a Markdown file with --page")
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: the byte 0x{error.object[error.start]:02x} at {error.start} is not UTF-8; save the page as UTF-8"
        ) from None


def rendered(path: Path, name: str) -> str:
    """The text between the markers."""
    return path.read_text(encoding="utf-8").split(f"<!-- {name}:begin -->\n")[1].split(f"\n<!-- {name}:end -->")[0]
