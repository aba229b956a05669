"""Reads version 0.1, which described training and operations as text: surgery.json, and the origin of a run. Imports no torch.

What records need as values is taken from it; the rest of a text is kept as the "folder" of a training or the "label" of an operation.
"""

import re
from typing import Any

TRAINED = ("dataset", "preset", "preset_settings", "method", "settings", "steps", "checkpoint", "seed", "folder")
RENAMED = {"slim": "keep_best"}


def pretrained(old: dict[str, Any]) -> dict[str, Any]:
    """The entry of the weights that a run started from; one of schema 2 is returned unchanged."""
    if "title" not in old:
        return old
    new = _without(old, "title") | {"folder": old["title"], "operations": []}
    if "surgery" in old:
        new["surgery"] = surgery(old["surgery"])
        later = old["title"].removeprefix(old["surgery"]["title"]).removeprefix(", ")
        new["operations"] = new["surgery"].pop("operations") + ([{"method": "train", "label": later}] if later else [])
        new |= new["surgery"].pop("trained")
    return new | ({"teacher": pretrained(old["teacher"])} if "teacher" in old else {})


def surgery(old: dict[str, Any]) -> dict[str, Any]:
    """The content of a surgery.json; one of schema 2 is returned unchanged."""
    if "label" not in old:
        return old
    earlier, _, label = old["label"].rpartition(", ")
    counts = re.match(r"\w+ (\d+) to ", label)
    sizes = {"from": int(counts[1]), "keep": old["keep"]} if counts else {}
    last = {"method": RENAMED.get(old["method"], old["method"]), **sizes}
    last |= {name: old[name] for name in ("options", "seed", "weights_sha256")}
    operations = ([{"method": "earlier", "label": earlier}] if earlier else []) + [last]
    if old["read"]:  # compressing reads nothing: the data decided the operation before it
        operations[0 if old["method"] == "compress" else -1]["read"] = old["read"]
    trained = {"folder": old["source"]["title"], "method": old["source"]["method"], "seed": old["source"]["seed"]}
    rest = _without(old, "method", "keep", "options", "seed", "source", "weights_sha256", "read", "label", "title")
    return {"trained": trained, "operations": operations, "source_sha256": old["source"]["sha256"]} | rest


def _without(old: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in old.items() if name not in names}
