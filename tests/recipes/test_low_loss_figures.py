"""Figures 5 and 7, width and depth in their quick sizes: they hold what plain code gives, and claims can fail."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from scipy.stats import spearmanr

from thalweg.lab.catalogue import load_recipe
from thalweg.lab.claims import judge
from thalweg.lab.ranks import spearman
from thalweg.lab.recipe import Context, Outcome
from thalweg.recipes.low_loss_connection import figure_5, figure_7, width_and_depth
from thalweg.recipes.low_loss_connection.endpoints import Task, TrainedPreset, endpoints, load

UNTESTED = {"figure_5": {"grows"}, "figure_7": set(), "width_and_depth": set()}
"""Claims that the quick sizes leave out: of figure 5's fewer than four numbers of samples."""
OUTCOMES: dict[str, Outcome] = {}


def quick(name: str) -> Outcome:
    if name not in OUTCOMES:
        recipe = load_recipe(f"low_loss_connection/{name}").recipe
        seen: list[float] = []
        OUTCOMES[name] = recipe.run(
            recipe.presets["quick"], Context(progress=lambda fraction, _: seen.append(fraction))
        )
        assert 0 <= min(seen) <= max(seen) <= 1
        assert seen == sorted(seen)
    return OUTCOMES[name]


@pytest.mark.parametrize("name", UNTESTED)
def test_the_quick_preset_holds(name: str) -> None:
    recipe, outcome = load_recipe(f"low_loss_connection/{name}").recipe, quick(name)
    verdicts = {claim.id: claim.verdict for claim in judge(recipe.claims, outcome.measured)}
    assert "fails" not in verdicts.values(), outcome.measured
    assert {c for c, v in verdicts.items() if v == "untested"} == UNTESTED[name]
    assert len(recipe.figures(outcome.tables)) >= 2


def nets_of(
    preset: TrainedPreset, build: Callable[..., torch.nn.Module], *, count: int
) -> tuple[Task, list[torch.nn.Module]]:
    task = load(preset, Context(), flat=True)
    return task, endpoints(lambda: build(preset, task), task, preset, Context(), seeds=range(count))


def test_figure_5_measures_both_networks_at_its_ends_and_first_samples_only() -> None:
    preset = figure_5.QUICK.model_copy(update={"epochs": 2, "samples": (30,), "hidden": (20, 10), "knots": 2})
    task, nets = nets_of(preset, figure_5._net, count=2)
    rows = figure_5._along(preset, Context(), task, (nets[0], nets[1]), 30)
    for net, row in zip(nets, (rows[0], rows[-1]), strict=True):
        for part, (inputs, targets) in (("train", [x[:30] for x in task.train]), ("test", task.test)):
            wrong = (net(inputs).argmax(1) != targets).double().mean()
            assert row[f"{part}_error"] == pytest.approx(float(wrong), abs=1e-12)


def test_figure_5_marks_the_points_between_fits_and_those_of_each_layer() -> None:
    rows = [row for row in quick("figure_5").tables["path"] if row["samples"] == 24]
    assert [row["position"] for row in rows] == sorted(row["position"] for row in rows)
    assert [{row["segment"] for row in rows if k < row["position"] <= k + 1} for k in range(3)] == [
        {name} for name in figure_5.SEGMENTS
    ]
    between = [round(row["position"], 6) for row in rows if row["is_between"]]
    expected = [k + 0.2 + 0.8 * s for k in (0, 1) for s in (1 / 6, 1 / 2, 5 / 6)]  # half-way between 4 fits
    assert between == [round(x, 6) for x in expected]


def test_figure_5_takes_the_rise_above_the_worse_end_from_the_points_of_the_fits() -> None:
    shared = {"pair": 0, "samples": 10, "ratio": 1.0, "worst_fit": 0.1}
    points = [(0.0, "wide", False, 0.1), (0.5, "wide", True, 0.9), (1.5, "narrow", False, 0.4)]
    points += [(2.0, "narrow", True, 0.3), (3.0, "last", False, 0.2)]
    keys = ("position", "segment", "is_between", "train_error")
    found = figure_5._worst([shared | dict(zip(keys, point, strict=True)) for point in points])
    got = {key: found[key] for key in ("ends", "rise", "wide", "narrow", "last", "between")}
    assert got == pytest.approx({"ends": 0.2, "rise": 0.2, "wide": -0.1, "narrow": 0.2, "last": 0.0, "between": 0.7})
    assert (found["segment"], found["position"]) == ("narrow", 1.5)


def test_figure_7_gives_what_averaged_probabilities_give() -> None:
    small = {"epochs": 2, "width": 12, "num_networks": 3, "num_orders": 1, "num_train": 200, "own_layers": (1, 3)}
    preset = figure_7.QUICK.model_copy(update=small)
    outcome = figure_7.run(preset, Context())
    task, nets = nets_of(preset, figure_7._net, count=3)
    inputs, targets = task.test
    total = torch.zeros(len(targets), task.num_classes)
    accuracies = [row["accuracy"] for row in outcome.tables["ensembles"] if row["ensemble"] == "Ind"]
    singles = [row["accuracy"] for row in outcome.tables["ensembles"] if row["ensemble"] == "single"]
    for net, accuracy, alone in zip(nets, accuracies, singles, strict=True):
        probabilities = net(inputs).softmax(1)
        total += probabilities
        assert accuracy == pytest.approx(float((total.argmax(1) == targets).double().mean()), abs=1e-12)
        assert alone == pytest.approx(float((probabilities.argmax(1) == targets).double().mean()), abs=1e-12)


def test_figure_7_counts_the_backbone_once() -> None:
    rows = {(row["ensemble"], row["models"]): row for row in quick("figure_7").tables["means"]}
    first, other, last = 64 * 64 + 64, 64 * 64 + 64, 64 * 10 + 10
    assert rows["single", 1]["parameters"] == first + 2 * other + last
    assert rows["Ind", 4]["parameters"] == 4 * rows["single", 1]["parameters"]
    assert rows["WA(2)", 4]["parameters"] == first + other + 4 * (other + last)
    assert rows["WA(1)", 4]["multiply_adds"] == 3 * 64 * 64 + 4 * 64 * 10
    averaged = quick("figure_7").tables["averaged"][0]
    assert averaged["parameters"] == rows["single", 1]["parameters"]


def test_width_and_depth_gives_each_pair_its_gap_and_all_networks_of_a_kind_their_mean() -> None:
    tables = quick("width_and_depth").tables
    assert all(row["train_gap"] >= 0 for row in tables["pairs"])
    kinds = [(row["series"], row["width"], row["depth"]) for row in tables["means"] if row["method"] == "Arc"]
    expected = [("width", width, 1) for width in width_and_depth.QUICK.widths]
    assert kinds == [*expected, ("depth", 24, 1), ("depth", 24, 2)]
    row = {"series": "width", "width": 4, "depth": 1, "method": "Arc", "train_ends": 0.9, "legs": 1, "test_gap": 0.1}
    (found,) = width_and_depth._means([row | {"train_gap": 0.1}, row | {"train_gap": 0.3}])
    assert (found["gap"], found["least"], found["most"], found["pairs"]) == pytest.approx((0.2, 0.1, 0.3, 2))


def test_each_claim_can_fail() -> None:
    wrong: dict[ModuleType, dict[str, Any]] = {
        figure_5: {
            "exact": [0.0, 0.6],
            "worse": {"N = width": [0.0, 1.0], "ten times": [2.0, 1.0]},
            "grows": 0.7,
            "narrow": {"wide": [1.0], "narrow": [1.0]},
            "segment": ["narrow", "last"],
        },
        figure_7: {
            "independent": {"single": 90.0, "Ind": 91.0, "WA(1)": 91.1},
            "order": 0.5,
            "gain": {"single": 90.0, "Ind": 91.0, "WA(1)": 90.2},
            "convex": 1e-3,
            "bound": {"averaged": 0.2, "largest single": 0.1},
        },
        width_and_depth: {"width": {"Linear": 1.0, "OT": 0.6}},
    }
    for module, values in wrong.items():
        checks = {claim.id: claim.check for claim in module.RECIPE.claims}
        assert set(checks) == set(values)
        assert {name: checks[name](value) for name, value in values.items()} == dict.fromkeys(values, False)


def test_claims_about_ten_times_the_width_are_left_out_where_there_are_too_few_samples() -> None:
    row = {"pair": 0, "samples": 10, "ratio": 1.0, "rise": 0.001, "segment": "wide", "wide": 0.001, "narrow": 0.0}
    assert figure_5._measured([row]) == {"exact": [0.1]}


@pytest.mark.parametrize("y", [[1.0, 2.0, 4.0, 3.0], [2.0, 2.0, 1.0, 5.0], [4.0, 3.0, 2.0, 1.0]])
def test_spearman_is_that_of_scipy(y: list[float]) -> None:
    x = [50.0, 100.0, 200.0, 800.0]
    assert spearman(x, y) == pytest.approx(float(spearmanr(x, y).statistic), abs=1e-12)
