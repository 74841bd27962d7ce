"""Tables 1 and 2 in their quick sizes, and claims that can fail."""

import pytest

from thalweg.lab.catalogue import load_recipe
from thalweg.lab.claims import judge
from thalweg.lab.recipe import Context, Outcome
from thalweg.recipes.low_loss_connection import table_1, table_2

OUTCOMES: dict[str, Outcome] = {}
TESTED = {"table_1": {"trained", "exact", "continuous", "ot_wa", "permuted", "garipov"}, "table_2": {"exact"}}
"""Claims of the quick sizes; the others are about real data."""


def quick(name: str) -> Outcome:
    if name not in OUTCOMES:
        recipe = load_recipe(f"low_loss_connection/{name}").recipe
        OUTCOMES[name] = recipe.run(recipe.presets["quick"], Context())
    return OUTCOMES[name]


@pytest.mark.parametrize("name", TESTED)
def test_the_quick_preset_holds(name: str) -> None:
    recipe, outcome = load_recipe(f"low_loss_connection/{name}").recipe, quick(name)
    verdicts = {claim.id: claim.verdict for claim in judge(recipe.claims, outcome.measured)}
    assert "fails" not in verdicts.values(), outcome.measured
    assert {c for c, v in verdicts.items() if v == "holds"} == TESTED[name]
    assert len(recipe.figures(outcome.tables)) >= 3


def test_every_row_of_the_table_is_measured() -> None:
    rows = {row["row"]: row for row in quick("table_1").tables["table"]}
    assert set(table_1.PUBLISHED["mnist"]) <= set(rows)
    assert all(0 <= row["train (worst)"] <= row["train (met)"] <= 1 for row in rows.values())
    assert all(row["status"] == "measured" for row in quick("table_1").tables["pairs"])


def test_the_straight_line_is_taken_apart() -> None:
    tables = quick("table_2").tables
    assert {row["order"] for row in tables["layers"]} == {"as they are", "aligned"}
    assert all(0 <= row["share"] <= 1 for row in tables["width"])


GOOD = {"Linear": 96.0, "Arc": 97.0, "Linear + WA": 98.7, "Arc + WA": 98.7, "OT": 98.8, "OT + WA": 98.9}


def test_each_claim_of_table_1_can_fail() -> None:
    wrong = {
        "trained": {"test": 97.4, "at least": 97.5},
        "exact": False,
        "continuous": 1.0,
        "linear_arc": {"Linear": 96.0, "Arc": 96.4},
        "order": {**GOOD, "End points": 99.9},
        "ot_wa": {"train": 0.2, "test": 0.6},
        "permuted": {"train": 0.1, "test": 0.4},
        "bijection": {"Arc": 97.0, "RealNVP bijection": 97.1},
        "flow": {"Arc": 97.0, "IAF flow": 97.4},
        "garipov": {"OT + WA": 96.9, "Garipov (3)": 98.0},
    }
    checks = {claim.id: claim.check for claim in table_1.RECIPE.claims}
    assert set(wrong) == set(checks)
    assert [name for name, value in wrong.items() if checks[name](value) is not False] == []
    assert checks["order"]({**GOOD, "End points": 99.1}) is True


def test_each_claim_of_table_2_can_fail() -> None:
    rows = {**GOOD, "Linear + B-fly": 96.5, "Arc + B-fly": 97.5, "End points": 99.0, "joint": 98.0}
    rows |= {"joint+activations": 98.5, "Linear": 40.0, "Arc": 50.0}
    rows |= {"Linear + B-fly": 45.0, "Arc + B-fly": 60.0}
    checks = {claim.id: claim.check for claim in table_2.RECIPE.claims}
    for name, broken in {
        "butterfly": {"Arc + B-fly": 49.0},
        "adjusted": {"Linear + WA": 49.0},
        "best": {"OT": 99.0},
        "ends": {"OT + WA": 88.0},
        "joint": {"joint": 90.0, "joint+activations": 97.0},
    }.items():
        judged = {row: rows[row] for row in table_2._JUDGED[name]}
        assert checks[name]({"fc3": judged}) is True, name
        assert checks[name]({"fc3": judged, "conv2fc1": {**judged, **broken}}) is False, name
    assert checks["exact"](False) is False
