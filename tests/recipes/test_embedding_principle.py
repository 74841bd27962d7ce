"""Every recipe of the paper in its quick size: it runs, its claims hold, and broken parameters are refused."""

import pytest

from thalweg.errors import PlanError
from thalweg.lab.catalogue import find_recipes, load_recipe
from thalweg.lab.claims import judge
from thalweg.lab.recipe import Context
from thalweg.recipes.embedding_principle import figure_3a, figure_3b

UNTESTED = {
    "embedding_principle/figure_3b": {"trained"},
    "embedding_principle/figure_5": {"agreement", "groups", "silent"},  # numbers of MNIST
}
NAMES = ("escape", "figure_1", "figure_3a", "figure_3b", "figure_4", "figure_5", "theorem_2")
RECIPES = [e.recipe.name for e in find_recipes() if e.recipe.name.startswith("embedding_principle/")]


def test_the_recipes_are_there() -> None:
    assert RECIPES == [f"embedding_principle/{n}" for n in NAMES]


@pytest.mark.parametrize("name", RECIPES)
def test_the_quick_preset_holds(name: str) -> None:
    recipe = load_recipe(name).recipe
    seen: list[float] = []
    outcome = recipe.run(recipe.presets["quick"], Context(progress=lambda fraction, _: seen.append(fraction)))
    verdicts = {claim.id: claim.verdict for claim in judge(recipe.claims, outcome.measured)}
    assert "fails" not in verdicts.values(), verdicts
    untested = UNTESTED.get(name, set[str]())
    assert {c for c, v in verdicts.items() if v == "untested"} <= untested
    assert len(recipe.figures(outcome.tables)) >= 2
    assert 0 <= min(seen) <= max(seen) <= 1


def test_shares_that_do_not_sum_to_one_are_refused_before_any_training() -> None:
    broken = figure_3a.QUICK.model_copy(update={"shares": ((0.6, 1.0, 0.5), (0.5, 0.5, 0.5, 0.5))})
    with pytest.raises(PlanError, match=r"shares of unit 0 to sum to 1\. Got \[0\.6, 0\.5\]"):
        figure_3a.RECIPE.run(broken, Context())


CLAIMS_3A = {c.id: c.check for c in figure_3a.RECIPE.claims}
CLAIMS_3B = {c.id: c.check for c in figure_3b.RECIPE.claims}


def test_each_claim_of_figure_3a_can_fail() -> None:
    shifted = {w: [v + 0.05 for v in values] for w, values in figure_3a.LOG_SIZES.items()}
    wrong = {
        "loss": 0.0710,
        "critical": 1e-11,
        "counts": {**figure_3a.COUNTS, "3": [0, 2, 7]},
        "sizes": shifted,
        "outputs": 1e-11,
        "gradient": [1e-15, 1e-13, 1e-15],
        "irreversible": [[1, 0, 5], [0, 2, 7]],
    }
    assert set(wrong) == set(CLAIMS_3A)
    for name, value in wrong.items():
        assert CLAIMS_3A[name](value) is False
    assert CLAIMS_3A["sizes"](figure_3a.LOG_SIZES) is True


def test_each_claim_of_figure_3b_can_fail_or_be_untested() -> None:
    assert CLAIMS_3B["one_zero"]({"points": 3, "zeros added by each neuron": [1, 2]}) is False
    assert CLAIMS_3B["one_zero"]({"points": 0, "zeros added by each neuron": []}) is None
    assert CLAIMS_3B["counts"]([[[3, 1], [5, 2], [8, 3]]]) is False
    assert CLAIMS_3B["irreversible"]([[[1, 0, 7], [0, 2, 14]]]) is False
    assert CLAIMS_3B["trained"]({"gradient L1": 1e-13, "zeros": [1, 1, 2]}) is False
    assert CLAIMS_3B["trained"]({"gradient L1": 1e-7, "zeros": [0, 0, 0]}) is None


def test_each_claim_of_theorem_2_can_fail() -> None:
    checks = {c.id: c.check for c in load_recipe("embedding_principle/theorem_2").recipe.claims}
    assert checks["minima"]({"net": None}) is False
    assert checks["minima"]({"net": 1e-9}) is False
    assert checks["dimension"]({"net": [2, 3]}) is False
    assert checks["gradient"]({"net": 11.0}) is False
    assert checks["outputs"]({"net": 1e-11}) is False
    assert checks["corank"]({"net": [0, 2, 3]}) is False
    assert checks["corank"]({}) is None
