"""Claims of the paper and of ours against the runs of a study: paired differences over seeds, their intervals, and verdicts."""

import statistics
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

from msgspec import Struct, convert, defstruct
from scipy.special import stdtr, stdtrit

from utils import documents
from utils.reporting.groups import Group, Row
from utils.reporting.records import ROOT
from utils.reporting.tables import DASH, Cell, Table, caption, differences
from utils.training.record_schema import Text

CLAIMS = ROOT / "script" / "ablation" / "claims.json"
MARGIN = 0.01  # within which two qualities are equal
LEVEL = 0.05  # of errors of the first kind
NOTE = (
    f"Claims: differences are paired by seed. Interval: Student's t, {1 - LEVEL:.0%}, of each claim alone. Equal: p of two one-sided tests "
    f"(TOST) of the hypothesis that the two differ by {MARGIN} or more. Reproduced: the whole interval is on the side of the claim; not "
    f"reproduced: it is on the other side, or p < {LEVEL}. What is neither is open."
)


class Side(Struct):
    """A row of the study, at k = E/2 or E."""

    row: Text
    k: Literal["E/2", "E"]


class Claim(Struct):
    """less - than < below. source: place in the paper; none of a claim of ours. published: the paper's difference. others: what
    independent reproductions found.
    """

    text: Text
    less: Side
    than: Side
    below: float = 0.0
    source: str = ""
    published: float | None = None
    others: str = ""


class Paired(NamedTuple):
    """Differences of pairs: mean, standard error of the mean, and their number."""

    mean: float
    error: float
    n: int

    @classmethod
    def of(cls, values: list[float]) -> "Paired":
        return cls(statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0, len(values))

    def interval(self) -> tuple[float, float]:
        """That of Student's t, two-sided; for two pairs or more."""
        half = float(stdtrit(self.n - 1, 1 - LEVEL / 2)) * self.error
        return self.mean - half, self.mean + half

    def equivalence(self, margin: float = MARGIN) -> float:
        """p of the hypothesis that the mean is `margin` or more away from 0 (TOST); for two pairs or more."""
        gap = margin - abs(self.mean)
        return float(stdtr(self.n - 1, -gap / self.error)) if self.error else float(gap <= 0)


@cache
def read_claims(path: Path = CLAIMS) -> list[Claim]:
    """The claims of a file written by hand."""
    schema = defstruct("File", [("about", str), ("entries", list[Claim])])
    return convert(documents.read(path, schema, "correct it, or restore it from version control")["entries"], list[Claim])


def verdict(found: Paired, claim: Claim) -> str:
    """The verdict of the pairs on a claim."""
    holds, fails = ("reproduced", "not reproduced") if claim.source else ("holds", "does not hold")
    if found.n < 2:
        return "open: one seed"
    low, high = found.interval()
    if high < claim.below:
        return holds
    if low > claim.below:
        return fails
    return f"{fails}: equal" if claim.below == 0 and found.equivalence() < LEVEL else "open"


def claim_table(group: Group, title: str) -> Table | None:
    """A row for every claim whose two sides have runs of the same seed; None without any."""
    rows = {row.label: row for row in group.rows}
    cells = [line for claim in read_claims() for line in _line(claim, rows)]
    if not cells:
        return None
    header = ["Claim", "Published", "Here, bpc", "95 % interval", "Equal, p", "Verdict", "Others"]
    return Table(
        f"claims:{group.stem}", f"{title}. {caption(group)}", header, [[Cell(text) for text in line] for line in cells], footnotes=[NOTE]
    )


def _line(claim: Claim, rows: dict[str, Row]) -> Iterator[list[str]]:
    if not {claim.less.row, claim.than.row} <= rows.keys():
        return
    values = differences(rows[claim.less.row], claim.less.k, rows[claim.than.row], claim.than.k)
    if not values:
        return
    found = Paired.of(values)
    several = found.n > 1
    yield [
        f"{claim.text} ({claim.source or 'ours'})",
        DASH if claim.published is None else f"{claim.published:+.3f}",
        f"{found.mean:+.3f} (n = {found.n})",
        "{:+.3f} to {:+.3f}".format(*found.interval()) if several else DASH,
        f"{found.equivalence():.3f}" if several else DASH,
        verdict(found, claim),
        claim.others or DASH,
    ]
