"""Figures 7 to 9 where something is missing: trainings that diverged, ranks of teacher nodes that are constant."""

from types import ModuleType
from typing import Any

import pytest
import torch
from tests.recipes.test_luck_matters_falling import BETTER, KINDS, TINY, labelled, of, table, verdicts

from thalweg.errors import NumericalError
from thalweg.lab.recipe import Context
from thalweg.lab.tables import Table
from thalweg.recipes.luck_matters import falling, figure_7, figure_8, figure_9, figure_10
from thalweg.recipes.luck_matters.pictures import by_epoch


@pytest.mark.parametrize("module", [figure_7, figure_8, figure_9], ids=lambda m: m.__name__.rpartition(".")[2])
def test_settings_whose_trainings_diverge_are_left_out_and_named(module: ModuleType) -> None:
    preset = TINY[module].model_copy(update={"cnn_learning_rate": 1e30})
    if module is figure_9:
        preset = preset.model_copy(update={"finite_kind": "cnn", "cnn_channels": (2, 2), "image_size": 8})
    outcome = module.run(preset, Context())
    gone = {row["setting"] for row in outcome.tables["diverged"]}
    assert gone == ({"infinite samples", "finite samples"} if module is figure_9 else {"CNN, without BN"})
    assert {row["last_finite_epoch"] for row in outcome.tables["diverged"]} == {0.0}
    assert len(outcome.tables["diverged"]) == len(gone) * preset.num_seeds
    assert len({row["setting"] for row in outcome.tables["layers"]}) >= 3
    assert not gone & {row["setting"] for name in ("layers", "students") for row in outcome.tables[name]}
    assert not {"stalls", "grows"} & set(outcome.measured)  # nothing is said of all settings where one is missing
    drawn = module.figures(outcome.tables)
    assert all("Left out, as their training diverged: seed 0 of" in f.caption for f in drawn)
    changes = {"learning_rate": 1e30} if module is figure_9 else {"learning_rate": 1e30, "norms": ("none",)}
    nowhere = preset.model_copy(update=changes)
    with pytest.raises(NumericalError, match=r"NaN or infinity in all \d+. Take smaller rates: learning_rate="):
        module.run(nowhere, Context())


def test_one_seed_that_diverges_is_left_out_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = falling.student_of

    def wild(teacher: Any, factor: int, norm: Any, seed: int) -> Any:
        student = draw(teacher, factor, norm, seed)
        if seed == 1:
            torch.nn.init.constant_(student[-1].weight, 1e30)
        return student

    preset = TINY[figure_7].model_copy(update={"kinds": ("fc",)})
    whole = figure_7.run(preset, Context())
    monkeypatch.setattr(falling, "student_of", wild)
    outcome = figure_7.run(preset, Context())
    assert [row["seed"] for row in outcome.tables["diverged"] if row["setting"] == "FC, without BN"] == [1]
    left = [row for row in whole.tables["layers"] if row["seed"] == 0]
    assert [row for row in outcome.tables["layers"] if row["seed"] == 0] == left
    with pytest.raises(NumericalError, match="seed 1"):  # where networks are compared in pairs
        figure_10.run(TINY[figure_10], Context())


def test_settings_are_compared_over_the_seeds_that_both_have() -> None:
    ends = {("small, without BN", 0): 0.99, ("small, without BN", 1): 0.59, ("small, with BN", 0): 0.95}
    layers = [{"layer": 0, "epoch": 1.0, "correlation": end, "setting": s, "seed": k} for (s, k), end in ends.items()]
    tables: dict[str, Table] = {"layers": layers, "diverged": [{"setting": "small, with BN", "seed": 1}]}
    fair = falling.in_common(tables)
    assert [row["correlation"] for row in fair] == [0.99, 0.95]
    assert figure_9.measured(by_epoch(fair), 0.9)["norm_hurts"] == pytest.approx(-0.04)
    assert figure_9.measured(by_epoch(layers), 0.9)["norm_hurts"] > 0  # over all seeds it would seem to help
    assert falling.in_common({"layers": []}) == []
    assert figure_7.measured([], is_quick=False) == figure_8.measured([], []) == figure_9.measured([], 0.9) == {}


@pytest.mark.parametrize("module", [figure_7, figure_8, figure_9], ids=lambda m: m.__name__.rpartition(".")[2])
def test_claims_are_measured_over_the_seeds_that_all_settings_have(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    draw, measured = falling.student_of, module.measured

    def wild(teacher: Any, factor: int, norm: Any, seed: int) -> Any:
        student = draw(teacher, factor, norm, seed)
        if seed == 1 and norm == "none":
            torch.nn.init.constant_(student[-1].weight, 1e30)
        return student

    def watched(means: Table, *rest: Any, **more: Any) -> Any:
        seen.append(means)
        return measured(means, *rest, **more)

    monkeypatch.setattr(falling, "student_of", wild)
    monkeypatch.setattr(figure_8, "student_of", wild)
    monkeypatch.setattr(module, "measured", watched)
    tables = module.run(TINY[module], Context()).tables
    assert {row["seed"] for row in tables["diverged"]} == {1}
    assert {row["seed"] for row in tables["layers"]} == {0, 1}
    assert seen == [by_epoch([row for row in tables["layers"] if row["seed"] == 0])]


def test_a_teacher_node_that_is_constant_has_no_rank() -> None:
    seen = {
        "winner_0": torch.tensor([2, 0]),
        "best_0": torch.tensor([0.9, 0.0]),
        "rank_0": torch.tensor([[2, 0], [1, 0], [1, 0]], dtype=torch.int16),
        "read_0": torch.ones(3),
    }
    assert falling._layer_row(seen, seen, 0)["rank"] == 0.5
    none = {"best_0": torch.zeros(2), "rank_0": torch.zeros(3, 2, dtype=torch.int16)}
    assert falling._layer_row(seen, seen | none, 0)["rank"] is None
    # a node that all students correlate with below zero, but for one that is constant, has a rank
    assert falling._layer_row(seen, seen | {"best_0": torch.zeros(2)}, 0)["rank"] == 0.5


@pytest.mark.parametrize("module", [figure_7, figure_8], ids=lambda m: m.__name__.rpartition(".")[2])
def test_a_layer_without_ranks_is_told_of_by_the_rest(module: ModuleType) -> None:
    means = [{k: v for k, v in row.items() if k != "rank" or row["layer"] != 0} for row in table(more=BETTER)]
    rest = () if module is figure_7 else (labelled(0.01),)
    found = verdicts(module, module.measured(means, *rest, **({"is_quick": False} if module is figure_7 else {})))
    assert of(found, "untested") == ({"early", "falls", "soon"} if module is figure_7 else {"early"})
    assert of(found, "fails") == set()
    bare = [{k: v for k, v in row.items() if k != "rank"} for row in means]
    assert module.measured(bare, *rest, **({"is_quick": False} if module is figure_7 else {}))
    tables: dict[str, Table] = {
        "by_epoch": by_epoch(means),
        "students": [{**row, "loss": 1.0} for row in labelled(0.01)],
    }
    titles = [figure.title for figure in module.figures(tables)]
    assert sum(title.startswith("Mean rank") for title in titles) == len(KINDS)
    titles = [figure.title for figure in module.figures(tables | {"by_epoch": by_epoch(bare)})]
    assert not [title for title in titles if title.startswith("Mean rank")]
