"""Pages of results/: what is rendered stands between two markers, the rest is written by hand."""

from pathlib import Path

from utils.errors import UserError


def update_page(path: Path, name: str, text: str) -> None:
    """Puts `text` between the two markers of `name` and leaves every other byte as it is."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    try:
        before = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if before.count(begin) != 1 or before.count(end) != 1 or before.index(begin) > before.index(end):
        raise UserError(f"{path}: needs the lines '{begin}' and '{end}', once each and in this order, around what is rendered")
    head, tail = before[: before.index(begin) + len(begin)], before[before.index(end) :]
    path.write_bytes(f"{head}\n{text}\n{tail}".encode())


def rendered(path: Path, name: str) -> str:
    """The text between the markers."""
    return path.read_text(encoding="utf-8").split(f"<!-- {name}:begin -->\n")[1].split(f"\n<!-- {name}:end -->")[0]
