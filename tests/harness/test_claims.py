"""Claims: the statistics against scipy's own tests, verdicts, and the table of a study."""

import copy

import numpy as np
import pytest
from scipy import stats

from tests.harness.test_ablations import run_of
from tests.tiny import parse
from utils.reporting.ablations import ablation_tables, all_ablations
from utils.reporting.claims import MARGIN, Claim, Paired, Side, read_claims, verdict

STUDY = all_ablations()["length"]


@pytest.mark.parametrize("values", [[0.004, -0.002, 0.001], [0.3, 0.28], [-0.02, -0.011, -0.016, -0.013]], ids=str)
def test_intervals_and_equivalence_are_those_of_scipy(values):
    found = Paired.of(values)
    np.testing.assert_allclose(found.interval(), stats.ttest_1samp(values, 0).confidence_interval(0.95))
    above, below = (stats.ttest_1samp(values, at, alternative=side).pvalue for at, side in ((-MARGIN, "greater"), (MARGIN, "less")))
    assert found.equivalence() == pytest.approx(max(above, below))


def test_without_spread_two_models_are_equal_only_within_the_margin():
    assert [Paired.of([value, value]).equivalence() for value in (0.009, 0.011)] == [0.0, 1.0]


@pytest.mark.parametrize(
    ("values", "below", "said"),
    [
        ([-0.1, -0.11, -0.09], 0.0, "reproduced"),
        ([0.1, 0.11, 0.09], 0.0, "not reproduced"),
        ([0.1, 0.11, 0.09], 0.2, "reproduced"),
        ([0.0005, -0.0004, 0.0001], 0.0, "not reproduced: equal"),
        ([0.0005, -0.0004, 0.0001], 0.0002, "open"),
        ([-0.1, 0.1], 0.0, "open"),
        ([-0.1], 0.0, "open: one seed"),
    ],
    ids=str,
)
def test_a_verdict_follows_from_the_interval_and_the_test(values, below, said):
    claim = Claim("a is better than b", Side("a", "E"), Side("b", "E"), below, source="Table 1")
    assert verdict(Paired.of(values), claim) == said


def test_a_claim_of_ours_is_not_called_reproduced():
    claim = Claim("a is better than b", Side("a", "E"), Side("b", "E"))
    assert [verdict(Paired.of([x, 1.01 * x, 0.99 * x]), claim) for x in (-1, 1)] == ["holds", "does not hold"]


def test_every_claim_is_about_rows_of_the_study():
    labels = {row.label for row in STUDY.rows}
    assert {side.row for claim in read_claims() for side in (claim.less, claim.than)} <= labels
    assert {True, False} == {bool(claim.source) for claim in read_claims()}


def runs(quality: dict[str, tuple[float, float]], step: float) -> list:
    """Runs of two seeds at 95 and dense ones at 5 tokens per parameter, from quality at E/2 and E by label."""
    found = []
    for row in STUDY.rows:
        if row.label in quality and (row.at == 95 or (row.at, row.label) == (5, "dense")):
            for seed in (1, 2):
                run = copy.deepcopy(run_of(parse([*row.words, "--preset", "replica"]), seed=seed))
                for entry in run["quality"]:
                    half, full = quality[row.label]
                    entry["test"] = (half if entry["k"] == 8 else full) + (row.at == 5) + step * seed
                found.append((f"{row.name}-{seed}", run))
    return found


def test_claims_stand_before_the_table_of_their_study():
    found = runs({"dense": (0, 2.0), "SMoE-Dropout": (2.5, 2.25), "learned router, trained at E/2": (2.3, 2.4)}, step=0.01)
    claims, *_, last = ablation_tables(found, ["length"])
    cells = {line[0].text.partition(" (")[0]: [cell.text for cell in line[1:]] for line in claims.rows}
    assert claims.caption.startswith("Claims. Length of training, tokens per parameter: 95.")
    worse = cells["With all experts SMoE-Dropout is better than dense"]
    assert worse[:2] + worse[4:] == ["–", "+0.250 (n = 2)", "not reproduced", "MCF-MoE, enwik8: 1.262 against 1.166"]
    assert cells["Half of the experts cost SMoE-Dropout less than 0.1 bpc"][4] == "not reproduced"
    assert cells["With all experts SMoE-Dropout is better than the learned router"][4] == "reproduced"
    assert not [text for text in cells if "THOR" in text or "Elastic" in text]
    shares = [line[-1].text for line in last.rows if not line[0].text.startswith("dense")]  # a quarter, and 0.4 of the way back to 5
    assert shares == [f"{round(100 * (880 / 16700) ** share)} %" for share in (0.4, 0.25)]
