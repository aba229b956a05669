"""Ablations: runs that differ from SMoE-Dropout's in one setting, as script/ablation/rows.json lists them.

A run belongs to a row if it has the identity that the row's flags have under its preset. Rows of Table 1 are taken from there.

    python -m utils.reporting.ablations NAME          # the names of its rows
    python -m utils.reporting.ablations NAME ROW      # the flags of a row, one word a line
    python -m utils.reporting.ablations NAME --preset # the preset of its runs unless another is given
"""

import itertools
import statistics
import sys
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import msgspec

from smoe_dropout.registry import unknown
from utils import documents
from utils.documents import Damaged
from utils.errors import UserError, run_main
from utils.flags.declare import specs
from utils.flags.derive import resolve, training_flags, usual_flags
from utils.flags.fields import Flags
from utils.reporting.claims import claim_table
from utils.reporting.groups import Group, Row, frozen, gather, quality_points, titled, with_own_stems
from utils.reporting.labels import Record, slug
from utils.reporting.records import ROOT, Found, file_name, split_of
from utils.reporting.tables import (
    DASH,
    PARAMETERS,
    Figure,
    Table,
    caption,
    differences,
    mean_cell,
    published,
    quality_column,
    quality_columns,
    table_of,
    values_at,
)
from utils.training.identity import departures

ROWS = ROOT / "script" / "ablation" / "rows.json"
EQUIVALENT = (
    "Equivalent training of dense: the steps after which dense is as good, between those recorded along the logarithm of steps, over the "
    "steps of the method; – outside of what is recorded."
)


@dataclass(frozen=True)
class AblationRow:
    """One entry of rows.json. run: the name of its runs. at: its place along the axis of a study; rows of a label are one curve."""

    name: str
    label: str
    flags: dict[str, Any]
    run: str = ""
    at: int | float | str | None = None

    @property
    def words(self) -> list[str]:
        """Its flags as words of a command line."""
        words = []
        for name, value in {**self.flags, "run_name": self.run}.items():
            words += [f"--{'' if value else 'no-'}{name}"] if isinstance(value, bool) else [f"--{name}", str(value)]
        return words


@dataclass(frozen=True)
class Ablation:
    """A table of rows. axis: title of the number in which rows differ, if it is one; along: its flag. by_share: k is compared as k/E.

    A study has a preset, the only one that its runs have, and curves along its axis instead of single rows. baseline: the label that the
    others are compared with. own_k: whether the place of a row is the k of its training, at which it is compared.
    """

    title: str
    rows: tuple[AblationRow, ...]
    name: str = ""
    axis: str = ""
    along: str = ""
    by_share: bool = False
    preset: str = ""
    baseline: str = ""
    own_k: bool = False

    @property
    def page(self) -> str:
        """The page and the folder in results/."""
        return self.preset or "ablation"

    @property
    def places(self) -> list[float | str]:
        """Those along the axis of a study, in order."""
        return list(dict.fromkeys(row.at for row in self.rows))

    def find(self, record: Record) -> tuple[int, float | None, dict[str, Any]] | None:
        """The row of a run, its number along the axis, and the further preset settings that the run has; None for a run of no row."""
        if self.preset not in ("", record["preset"]):
            return None
        identities = _identities(self.name, record["model"]["architecture"], record["preset"])
        varied = {name for (_, _, preset_settings), _ in identities for name in preset_settings}
        own, further = ({n: v for n, v in record["preset_settings"].items() if (n in varied) == of_row} for of_row in (True, False))
        for index, (identity, number) in enumerate(identities):
            if (record["method"], record["settings"], own) == identity and "pretrained" not in record:
                return index, number, further
        return None


@cache
def all_ablations() -> dict[str, Ablation]:
    """Those of rows.json by name. Damaged if it cannot be used."""
    found, remedy = documents.read(ROWS, dict[str, Ablation], "restore it from version control"), "correct it"
    for name, one in msgspec.convert(found, dict[str, Ablation]).items():
        rows = []
        for row in one.rows:
            flags, known = row.flags | ({"preset": one.preset} if one.preset else {}), specs(Flags).keys()
            if wrong := {"method"} - flags.keys() or {*flags, one.along or "method"} - known:
                fault = f"is damaged: the row {row.name} of {name} has no method, or the unknown flag {min(wrong)}"
                raise Damaged(ROWS, fault, remedy)
            documents.validate(flags, Flags, ROWS, remedy)
            rows.append(replace(row, flags=flags, run=row.run or row.name))
        found[name] = replace(one, name=name, rows=tuple(rows))
    return found


@cache
def _identities(name: str, model: str, preset: str) -> list[tuple[tuple, float | str | None]]:
    """Method, settings and preset settings of the records of each row, and its place along the axis."""
    found = []
    for row in all_ablations()[name].rows:
        method, along = row.flags["method"], all_ablations()[name].along
        flags = resolve(Flags(**{**training_flags(model, method, preset), **row.flags, "model": model, "preset": preset}))
        preset_settings, settings = departures(flags, usual_flags(flags))
        found.append(((method, settings, preset_settings), getattr(flags, along) if along else row.at))
    return found


def place(record: Record, page: str = "ablation") -> Path:
    """The path of a record in the folder of a page, by the first row that it belongs to. UserError for a run of no row."""
    for ablation in all_ablations().values():
        if ablation.page == page and (found := ablation.find(record)):
            index, _, rest = found
            name = file_name(record | {"preset_settings": rest}).replace(f"-{page}", "", 1)  # the folder says it
            return Path(slug(f"{ablation.name}-{ablation.rows[index].name}")) / name
    raise UserError(f"a run of {record['method']} with {record['settings']} is no row of {ROWS.relative_to(ROOT)}")


def groups_of(ablation: Ablation, found: Found) -> list[Group]:
    """The rows that have runs, in the ablation's order; a group for each text, preset and architecture in which two rows differ."""
    known = [(path, record) for path, record in found if ablation.find(record)]

    def group_of(record: Record) -> tuple[str, ...]:
        return record["dataset"]["title"], record["preset"], frozen(ablation.find(record)[2]), record["model"]["architecture"]

    groups = []
    for rows in gather(known, group_of, lambda record: ablation.find(record)[0]):
        for row in rows:
            index, row.number, further = ablation.find(row.first)
            row.label = ablation.rows[index].label
        if _comparable(ablation, rows):
            group = titled(rows, further)
            group.stem = f"{group.stem.replace(f'-{ablation.page}', '', 1)}-{ablation.name}"
            groups.append(group)
    return with_own_stems(groups)


def _comparable(ablation: Ablation, rows: list[Row]) -> bool:
    """Return whether two rows differ; in a study, whether there is a curve of a model with experts or a gap to the baseline."""
    if not ablation.preset:
        return len({row.number if ablation.axis else row.label for row in rows}) > 1
    if ablation.own_k:
        return len(rows) > 1 and ablation.baseline in {row.label for row in rows}
    sparse = [row.label for row in rows if row.sparse]
    return len({*sparse}) < len(sparse) or (bool(sparse) and ablation.baseline in {row.label for row in rows})


def ablation_tables(found: Found, only: list[str] | None = None, page: str = "ablation") -> list[Table]:
    """Tables and a figure for each ablation of a page with at least two finished rows, or for each of `only`."""
    ablations = [one for name, one in all_ablations().items() if (one.page == page if only is None else name in only)]
    groups = [(ablation, group) for ablation in ablations for group in groups_of(ablation, found)]
    return [table for one, group in groups for table in _tables(one, group)]


def _tables(ablation: Ablation, group: Group) -> list[Table]:
    if ablation.own_k:
        return [own_k_table(ablation, group)]
    return study_tables(ablation, group) if ablation.preset else [build_table(ablation, group)]


def build_table(ablation: Ablation, group: Group) -> Table:
    """Quality at E/2, at E and at the best k, and the published numbers where there are any."""

    def best(row: Row) -> str:
        choose = min if group.metric["lower_is_better"] else max
        k, _, mean, _ = choose(quality_points(row), key=lambda point: point[2])
        return f"{mean:.3f}" + (f" (k = {k})" if k else "")

    shown = group.shown.capitalize()
    columns = [quality_column(f"{shown}, k = E/2", "E/2"), quality_column("k = E", "E")]
    more, sources = published(group, ablation.name)
    columns += [("best k (mean)", best), PARAMETERS, *more]
    figure = Figure(f"{group.stem}.png", f"{ablation.title}: quality against k", "draw_ablation", (ablation, group))
    return table_of("ablation", f"{ablation.title}. {caption(group)}", group, ablation.title, columns, footnotes=sources, figures=[figure])


def study_tables(study: Ablation, group: Group) -> list[Table]:
    """A table for each place along the axis: quality, its loss from E to E/2, and the gap to the baseline. The figure is below the last.

    With a baseline the claims at each place stand before, those at the last place first.
    """
    columns = [*quality_columns(group), ("loss from E to E/2", lambda row: mean_cell(differences(row, "E/2", row, "E")))]
    if study.baseline:
        titles = [(share, f"gap to {study.baseline}, k = {share}") for share in ("E/2", "E")]
        columns += [
            (title, lambda row, share=share: mean_cell(gaps(study, group, row, share), of=len(row.records))) for share, title in titles
        ]
        columns.append(("equivalent training of dense, k = E", lambda row: _equivalent(study, group, row)))
    tables, claims = [], []
    for at in study.places:
        part = replace(group, rows=[row for row in group.rows if row.number == at], stem=f"{group.stem}-{slug(str(at))}")
        if part.rows:
            tables.append(table_of(study.page, f"{study.title}: {at}. {caption(part)}", part, "Method", columns))
            if study.baseline in {row.label for row in group.rows} and (found := claim_table(part, f"Claims. {study.title}: {at}")):
                claims.insert(0, found)
    tables[-1].figures = [Figure(f"{group.stem}.png", f"{study.title}: quality at k = E and E/2", "draw_study", (study, group))]
    if study.baseline:
        tables[-1].footnotes.append(EQUIVALENT)
    return [*claims, *tables]


def _equivalent(study: Ablation, group: Group, row: Row) -> str:
    """Steps in which the baseline has the mean quality that a row has at k = E, over the row's own."""
    if row.label == study.baseline:
        return DASH

    def point(row: Row) -> tuple[int, float]:
        return row.first["training"]["steps"], statistics.mean(values_at(row, "E", split_of(row.first)))

    steps, quality = point(row)
    for (short, worse), (long, better) in itertools.pairwise(sorted(point(other) for other in group.rows if other.label == study.baseline)):
        if better <= quality <= worse and better < worse:
            return f"{short * (long / short) ** ((worse - quality) / (worse - better)) / steps:.0%}".replace("%", " %")
    return DASH


def own_k_table(study: Ablation, group: Group) -> Table:
    """Quality of each row at the k of its training, and that of the baseline there."""
    (base,) = (row for row in group.rows if row.label == study.baseline)
    rows = sorted((row for row in group.rows if row is not base), key=lambda row: row.number)

    def values(row: Row, k: float) -> dict[int, float]:
        return {record["seed"]: one[split_of(record)] for record in row.records for one in record["quality"] if one["k"] == k}

    def behind(row: Row) -> str:
        one, own = values(base, row.number), values(row, row.number)
        return mean_cell([one[seed] - own[seed] for seed in one if seed in own]).text

    columns = [
        (f"{group.shown.capitalize()}, at its k", lambda row: mean_cell(values(row, row.number).values()).text),
        (f"{study.baseline}, at this k", lambda row: mean_cell(values(base, row.number).values()).text),
        ("difference", behind),
    ]
    figure = Figure(f"{group.stem}.png", study.title, "draw_own_k", (study, group))
    part = replace(group, rows=rows)
    return table_of(study.page, f"{study.title}. {caption(group)}", part, "Method", columns, figures=[figure])


def gaps(study: Ablation, group: Group, row: Row, share: str) -> list[float]:
    """Quality at k = E/2 or E less that of the baseline at the same place, for each seed that both have; empty for the baseline itself."""
    base = [other for other in group.rows if other.label == study.baseline and other.number == row.number]
    return differences(row, share, base[0], "E") if base and base[0] is not row else []


def main(argv: list[str] | None = None) -> None:
    """Prints the rows of an ablation, its preset, or the flags of one row."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or [""]
    if name not in all_ablations():
        raise UserError(unknown("ablation", name, list(all_ablations())))
    rows = {row.name: row for row in all_ablations()[name].rows}
    if rest == ["--preset"]:
        print(all_ablations()[name].preset or Flags.preset)
        return
    if rest and rest[0] not in rows:
        raise UserError(unknown(f"row of {name}", rest[0], list(rows)))
    print("\n".join(rows[rest[0]].words if rest else rows))


if __name__ == "__main__":
    run_main(main)
