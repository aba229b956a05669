"""Converts records and surgery.json of the version before, which held identity as text. Imports no torch."""

import re
from typing import Any

TRAINED = ("dataset", "preset", "preset_settings", "method", "settings", "steps", "checkpoint", "seed", "folder")
ARCHITECTURES = {"Transformer-XL": "transformer_xl", "BERT": "bert", "RoBERTa": "roberta"}
RENAMED = {"slim": "keep_best"}
_TITLE = re.compile(
    r"(?P<dataset>.+?), (?P<preset>paper|laptop|quick)(?: \((?P<settings>.*?)\))?"
    r"(?:, (?P<steps>[\d,]+) steps|, step (?P<checkpoint>\d+))?(?:, (?P<operations>.+))?"
)


def record(old: dict[str, Any]) -> dict[str, Any]:
    """A record of schema 2 from one of schema 1; any other is returned as it is."""
    if old.get("schema") != 1 or "method" not in old:
        return old
    (method, settings), (preset, preset_settings) = _named(old["method"]), _named(old["preset"])
    carried = ("surgery", "pretrained_")  # said by `pretrained`
    settings = {name: value for name, value in settings.items() if not name.startswith(carried)}
    new = {name: value for name, value in old.items() if name != "title"}
    new |= {"schema": 2, "method": method, "settings": settings, "preset": preset, "preset_settings": preset_settings}
    new["metric"] = {"split": "test", "training": old["metric"]["name"]} | old["metric"]
    new["model"] = old["model"] | {"architecture": ARCHITECTURES[old["model"]["architecture"]]}
    if "pretrained" in old:
        new["pretrained"] = {"method": method} | pretrained(old["pretrained"])
        before = {name.removeprefix("pretrained_"): value for name, value in _named(old["method"])[1].items() if "pretrained_" in name}
        if not new["pretrained"]["operations"]:
            new["pretrained"]["settings"] = before
    return new


def pretrained(old: dict[str, Any]) -> dict[str, Any]:
    """The entry of the weights that a run started from."""
    if "title" not in old:
        return old
    new = _training(old["title"]) | {name: value for name, value in old.items() if name != "title"}
    if "surgery" in old:
        stored = surgery(old["surgery"])
        operations = new["operations"]
        operations[: len(stored["operations"])] = stored["operations"][: len(operations)]
        new |= stored["trained"]
        new["surgery"] = {name: value for name, value in stored.items() if name not in ("trained", "operations")}
    if "teacher" in old:
        new["teacher"] = {"method": new.get("method")} | pretrained(old["teacher"])
    return new


def surgery(old: dict[str, Any]) -> dict[str, Any]:
    """The content of a surgery.json."""
    if "label" not in old:
        return old
    source = old["source"]
    trained = _training(source["title"]) | {"method": source["method"], "seed": source["seed"]}
    trained.pop("operations")
    operations = _operations(old["label"])
    last = next(one for one in reversed(operations) if one["method"] != "train")
    last |= {name: old[name] for name in ("options", "seed", "weights_sha256")}
    reading = next((one for one in reversed(operations) if one["method"] not in ("train", "compress")), None)
    if reading and old["read"]:
        reading["read"] = old["read"]
    said = ("method", "keep", "options", "seed", "source", "weights_sha256", "read", "label", "title")
    kept = {name: value for name, value in old.items() if name not in said}
    return {"trained": trained, "operations": operations, "source_sha256": source["sha256"]} | kept


def _training(title: str) -> dict[str, Any]:
    """ "Words, quick (lr=0.1), 24 steps, merge 4 to 2" as values."""
    found = _TITLE.fullmatch(title)
    if found is None:  # weights alone, called after their folder
        return {"folder": title, "operations": []}
    trained = {"dataset": {"title": found["dataset"]}, "preset": found["preset"], "preset_settings": _settings(found["settings"])}
    if found["steps"]:
        trained["steps"] = _count(found["steps"])
    if found["checkpoint"]:
        trained["checkpoint"] = int(found["checkpoint"])
    return trained | {"operations": _operations(found["operations"])}


def _operations(text: str | None) -> list[dict[str, Any]]:
    """ "merge 16 to 8, 500 steps, compress rank 16 kept 0.1" as values."""
    operations: list[dict[str, Any]] = []
    for part in text.split(", ") if text else ():
        if part == "taught":
            operations[-1]["taught"] = True
        elif found := re.fullmatch(r"(?:pruned to ([\d.]+) in )?([\d,]+) steps", part):
            pruned = {"pruned_to": float(found[1])} if found[1] else {}
            operations.append({"method": "train", "steps": _count(found[2]), **pruned})
        elif found := re.fullmatch(r"step (\d+)", part):
            operations.append({"method": "train", "checkpoint": int(found[1])})
        else:
            operations.append(_operation(part))
    return operations


def _operation(text: str) -> dict[str, Any]:
    method, _, rest = text.partition(" ")
    options = {name: _value(value) for name, value in re.findall(r"\b(rank|kept|score) (\S+)", rest)}
    options |= {"by_layer": True} if "by_layer" in rest else {}
    counts = re.match(r"(\d+) to (\d+)", rest)
    sizes = {"from": int(counts[1]), "keep": int(counts[2])} if counts else {}
    return {"method": RENAMED.get(method, method), **sizes, "options": options}


def _named(text: str) -> tuple[str, dict[str, Any]]:
    """ "smoe (gate_name=hash, moe_index=0,1)" -> "smoe", {"gate_name": "hash", "moe_index": "0,1"}."""
    name, _, rest = text.partition(" ")
    return name, _settings(rest[1:-1])


def _settings(text: str | None) -> dict[str, Any]:
    words = re.findall(r"(\w+)=(.*?)(?=, \w+=|$)", text or "")
    return {name: _value(value) for name, value in words}


def _value(text: str) -> Any:
    if text in ("True", "False", "None"):
        return {"True": True, "False": False, "None": None}[text]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _count(text: str) -> int:
    return int(text.replace(",", ""))
