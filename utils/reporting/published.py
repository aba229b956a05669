"""Numbers that others measured in other settings, as a table of their own below Tables 1 and 2."""

from smoe_dropout.registry import METHODS
from utils.reporting.labels import method_title
from utils.reporting.records import read_published
from utils.reporting.tables import DASH, Cell, Table

SHARES = {"E/2": "k = E/2", "E": "k = E", "reported": "k not told"}  # what a value is of, by its name in published.json


def elsewhere(name: str) -> list[Table]:
    """One table of the entries of published.json for this table; none without entries."""
    entries = [entry for entry in read_published() if entry["table"] == name]
    shares = list(dict.fromkeys(share for entry in entries for share in entry["values"]))
    rows = []
    for entry in entries:
        method = method_title(entry["method"]) if entry["method"] in METHODS else entry["method"]
        values = [str(entry["values"].get(share, DASH)) for share in shares]
        rows.append([method, f"{entry['dataset']}, {entry['metric']}", *values, entry.get("setting", DASH), entry["source"]])
    header = ["Method", "Measured", *(SHARES.get(share, share) for share in shares), "Setting", "Source"]
    caption = "Published by others, in settings that differ from ours: no number here is to be compared with one above."
    return [Table(f"{name}:published", caption, header, [[Cell(text) for text in row] for row in rows])] if rows else []
