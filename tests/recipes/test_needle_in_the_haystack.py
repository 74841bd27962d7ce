"""Lab 2 in its quick sizes: claims hold, an interrupted protocol goes on to the same result, claims can fail."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from thalweg.errors import MemoryLimitError
from thalweg.lab.catalogue import load_recipe
from thalweg.lab.claims import judge
from thalweg.lab.parts import Share, averages, part
from thalweg.lab.recipe import Context, Outcome
from thalweg.lab.tables import Table
from thalweg.recipes.needle_in_the_haystack import interpolate, relax, relax_local, sharpness
from thalweg.recipes.needle_in_the_haystack.images import Images, scores
from thalweg.recipes.needle_in_the_haystack.measures import sizes, summary
from thalweg.recipes.needle_in_the_haystack.protocol import Protocol, ProtocolPreset, loaded, log_spaced

TESTED = {
    "relax": {"exact", "falls", "remembers", "off_local", "small"},
    "relax_local": {"exact", "falls", "remembers"},
    "sharpness": {"projected"},
    "interpolate": {"ends"},
}
"""What the quick sizes test: digits are too small and too plain to compare kinds of networks on."""
OUTCOMES: dict[str, Outcome] = {}


def quick(name: str) -> Outcome:
    if name not in OUTCOMES:
        recipe = load_recipe(f"needle_in_the_haystack/{name}").recipe
        seen: list[float] = []
        OUTCOMES[name] = recipe.run(recipe.presets["quick"], Context(progress=lambda x, _: seen.append(x)))
        assert 0 <= min(seen) <= max(seen) <= 1
        assert seen == sorted(seen)
    return OUTCOMES[name]


@pytest.mark.parametrize("name", TESTED)
def test_the_quick_preset_holds(name: str) -> None:
    recipe, outcome = load_recipe(f"needle_in_the_haystack/{name}").recipe, quick(name)
    verdicts = {claim.id: claim.verdict for claim in judge(recipe.claims, outcome.measured)}
    assert {c for c, v in verdicts.items() if v == "holds"} == TESTED[name], outcome.measured
    assert "fails" not in verdicts.values()
    assert len(recipe.figures(outcome.tables)) >= 2


def test_relax_times_are_those_of_the_papers_figures() -> None:
    own = (0, 1, 2, 3, 4, 6, 8, 10, 13, 18, 23, 30, 40, 52, 67, 88, 115, 150)
    assert relax.PAPER.times == own
    assert log_spaced(100, 20) == (0, 1, 2, 3, 4, 5, 6, 8, 11, 14, 18, 23, 29, 37, 48, 61, 78, 100)


def test_the_paper_presets_have_the_papers_sizes() -> None:
    for preset, count in ((relax.PAPER, 143_178), (relax.PAPER_ALEXNET, 2_895_076)):
        empty = torch.zeros(2, 3, 32, 32), torch.zeros(2, dtype=torch.long)
        classes = 100 if preset.data == "cifar100" else 10
        protocol = Protocol(preset, Context(), 0, relax_images(empty, classes))
        assert sum(p.numel() for p in protocol.build().parameters()) == count
    works = [("fc", None), ("fc", 0), ("local", 0)]
    words = sizes(Protocol(relax.PAPER, Context(), 0, relax_images(empty, 10)), works)
    assert "2 of 110,606,602 parameters (fc), 442.4 MB each, 1 of 7,797,002 parameters (local)" in words
    alexnet = sizes(Protocol(relax.PAPER_ALEXNET, Context(), 0, relax_images(empty, 100)), works[:1])
    assert "239,095,844 parameters" in alexnet


def test_networks_that_do_not_fit_are_refused_before_anything_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("thalweg.lifting.memory.available_memory", lambda device: 1_000)
    with pytest.raises(MemoryLimitError, match=r"bytes .* of memory to train a network of .* Got 1,000"):
        relax.run(small(), Context())


@pytest.mark.parametrize(
    "changes",
    [
        {"relax_times": (0, 9), "epochs": 4},
        {"relax_times": ()},
        {"relax_times": (4, 0)},
        {"relax_times": (0, 0)},
        {"num_times": 1},
        {"num_seeds": 0},
    ],
)
def test_impossible_times_and_counts_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ProtocolPreset(**changes)


@pytest.mark.parametrize("changes", [{"network": "alexnet", "width": 0.05}, {"optimizer": "adam"}])
def test_other_networks_and_optimizers_go_through_the_protocol(changes: dict[str, Any]) -> None:
    rates = {"learning_rate": 0.001, "relaxed_learning_rate": 0.001}
    preset = small().model_copy(update={"relax_times": (0,), "epochs": 1, "relaxed_epochs": 1, **rates, **changes})
    rows = relax.run(preset, Context()).tables["networks"]
    assert [row["network"] for row in rows] == ["CNN", "FCN", "eFCN"]
    assert rows[2]["gap"] < 1e-5


def relax_images(part_of: tuple[torch.Tensor, torch.Tensor], classes: int) -> Images:
    return Images(part_of, part_of, classes)


class Stop(Exception):
    """An interruption."""


def small() -> relax.RelaxPreset:
    changes = {"epochs": 4, "relaxed_epochs": 3, "relax_times": (0, 2, 4), "num_train": 80, "num_test": 60}
    return relax.QUICK.model_copy(update=changes)


def plain(tables: Any) -> dict[str, Table]:
    """Tables without what a clock says."""
    return {
        name: [{key: value for key, value in row.items() if "seconds" not in key} for row in rows]
        for name, rows in tables.items()
    }


@pytest.mark.parametrize("stop", [0.15, 0.5, 0.8])
def test_an_interrupted_protocol_goes_on_to_the_same_result(
    stop: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("thalweg.training.minibatch._KEPT_EVERY", 0.0)
    whole = relax.run(small(), Context())

    def interrupting(fraction: float, _: str) -> None:
        if fraction >= stop:
            raise Stop

    with pytest.raises(Stop):
        relax.run(small(), Context(folder=tmp_path, progress=interrupting))
    kept = list(tmp_path.iterdir())
    assert kept
    again = relax.run(small(), Context(folder=tmp_path))
    assert plain(again.tables) == plain(whole.tables)


def test_a_finished_part_is_not_computed_again_and_its_large_states_go(tmp_path: Path) -> None:
    calls = []

    def compute(folder: Path | None) -> dict[str, Any]:
        calls.append(1)
        assert folder is not None
        folder.mkdir(exist_ok=True)  # an interruption may have left it
        (folder / "fit-large.pt").write_bytes(b"state")
        if len(calls) == 1:
            raise Stop
        return {"rows": [1.5]}

    context = Context(folder=tmp_path)
    with pytest.raises(Stop):
        part(context, "one", "data", compute)
    assert [p.name for p in tmp_path.iterdir()] == ["states-one"]
    assert part(context, "one", "data", compute) == part(context, "one", "data", compute) == {"rows": [1.5]}
    assert len(calls) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["part-one.json"]
    assert part(context, "one", "other data", compute) == {"rows": [1.5]}
    assert len(calls) == 3
    (tmp_path / "part-one.json").write_text("{broken")
    assert part(context, "one", "other data", compute) == {"rows": [1.5]}
    assert len(calls) == 4


def test_masked_accuracies_are_those_of_plain_masks() -> None:
    preset = small()
    protocol = Protocol(preset, Context(), 0, loaded(preset, Context()))
    states, _ = protocol.convolutional(Share(Context()), (0, 4))
    made = protocol.relaxed(states[4], 4, "fc", Share(Context()), None)
    row = summary(protocol, made)
    ones = made.lifting.apply(torch.ones(made.lifting.space.num_params))
    mask = made.lifting.lifted_space.parameters(ones)
    inputs, targets = protocol.images.test
    for name, keep in (("local_alone", 1.0), ("off_local_alone", 0.0)):
        state = {
            key: value * (mask[key] == keep) if key.endswith("linear.weight") else value
            for key, value in made.state.items()
        }
        twin = made.module
        before = {key: value.clone() for key, value in twin.state_dict().items()}
        twin.load_state_dict(state)
        assert row[name] == pytest.approx(scores(twin(inputs).detach(), targets)[1], abs=1e-12)
        twin.load_state_dict(before)


def test_the_dense_network_from_scratch_has_torchs_initialisation() -> None:
    preset = small()
    module, _ = Protocol(preset, Context(), 3, loaded(preset, Context())).unconstrained("fc")
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            bound = layer.in_features**-0.5
            assert float(layer.weight.detach().abs().max()) <= bound
            assert float(layer.weight.detach().abs().mean()) == pytest.approx(bound / 2, rel=0.1)


def test_averages_give_means_and_ranges_and_leave_out_what_is_missing() -> None:
    rows = [{"kind": "a", "x": 1.0, "y": None}, {"kind": "a", "x": 3.0, "y": 2.0}, {"kind": "b", "x": 5.0}]
    found = averages(rows, ("kind",), ("x", "y"))
    assert found[0] == {"kind": "a", "x": 2.0, "x_least": 1.0, "x_most": 3.0, "y": 2.0, "y_least": 2.0, "y_most": 2.0}
    assert found[1] == {"kind": "b", "x": 5.0, "x_least": 5.0, "x_most": 5.0}


def relaxed_row(time: int | None, network: str, accuracy: float, **others: float) -> dict[str, Any]:
    usual = {"delta": 0.05, "local_alone": accuracy - 0.05, "off_local_alone": 0.1, "scale": 0.01}
    usual["best_test_accuracy"] = accuracy
    return (
        {"network": network, "relax_time": time, "test_accuracy": accuracy, "start_test_accuracy": 0.1}
        | usual
        | others
    )


def test_claims_about_accuracy_can_fail() -> None:
    def verdicts(efcn: list[float], cnn: float, fcn: float, deltas: list[float]) -> dict[str, str]:
        times = (0, 3, 9, 30)
        by_time = [relaxed_row(t, "eFCN", a, delta=d) for t, a, d in zip(times, efcn, deltas, strict=True)]
        by_time += [relaxed_row(None, "CNN", cnn), relaxed_row(None, "FCN", fcn, delta=0.97)]
        singles = [
            {**row, "gap": 0.0, "train_loss": 0.5, "start_train_loss": 1.0, "is_monotone": True}
            for row in by_time
            if row["network"] == "eFCN"
        ]
        measured = relax._measured(singles, by_time, 10)
        return {claim.id: claim.verdict for claim in judge(relax.RECIPE.claims, measured)}

    good = verdicts([0.62, 0.70, 0.73, 0.72], 0.72, 0.57, [0.08, 0.06, 0.04, 0.01])
    assert {"fails"}.isdisjoint(good.values())
    bad = verdicts([0.58, 0.70, 0.71, 0.74], 0.72, 0.57, [0.01, 0.06, 0.04, 0.2])
    assert {c for c, v in bad.items() if v == "fails"} == {"prior", "reaches", "exceeds", "nearer", "near"}


def test_sharpness_looks_for_a_peak_between() -> None:
    def rows(starts: list[float]) -> Table:
        return [
            {"relax_time": t, "when": when, "gradient": value, "curvature": value}
            for t, s in zip((0, 5, 20), starts, strict=True)
            for when, value in (("start", s), ("end", 1.0))
        ]

    assert sharpness._measured(rows([4.0, 8.0, 2.0]))["gradient_falls"] == 2.0
    assert "curvature_falls" not in sharpness._measured(rows([4.0, 8.0, 2.0]), is_converged=False)
    peak = {c.id: c for c in sharpness.RECIPE.claims}["gradient_peak"]
    assert peak.check(sharpness._measured(rows([1.0, 8.0, 2.0]))["gradient_peak"])
    assert not peak.check(sharpness._measured(rows([1.0, 8.0, 9.0]))["gradient_peak"])


def test_interpolation_measures_gains_and_barriers() -> None:
    def row(time: int, method: str, ends: float, within: float, peak: float, **others: Any) -> dict[str, Any]:
        shared = {"seed": 0, "relax_time": time, "method": method, "status": "finished", "middle": within}
        return {**shared, "ends": ends, "within": within, "barrier": peak, "peak": peak, **others}

    summaries = [
        row(1, "linear", 0.6, 0.65, 0.5),
        row(1, "string", 0.6, 0.66, 0.3),
        row(1, "outputs", 0.6, 0.68, 0.0),
    ]
    summaries += [
        row(9, "linear", 0.7, 0.69, 0.1),
        row(9, "string", 0.7, 0.68, 0.2),
        row(9, "outputs", 0.7, 0.6, 0.0),
    ]
    found = interpolate._measured(summaries)
    assert found.pop("late") == {"latest": 0.1, "earliest": 0.5}
    assert found == pytest.approx({"gain": 0.5, "outputs": 9.0, "barrier": 0.3, "string": 0.1})
    verdicts = {c.id: c.verdict for c in judge(interpolate.RECIPE.claims, interpolate._measured(summaries))}
    assert {c for c, v in verdicts.items() if v == "fails"} == {"outputs", "string", "late"}
    summaries[4]["status"] = "diverged"  # a string that is none says nothing
    assert "string" not in interpolate._measured(summaries)


def test_costs_are_set_against_the_best_accuracy() -> None:
    cost = {row["network"]: row for row in quick("relax_local").tables["cost"]}
    assert cost["eLCN"]["parameters"] < cost["eFCN"]["parameters"]
    assert cost["eLCN"]["megabytes"] > 4e-6 * cost["eLCN"]["parameters"]  # those that read padding are stored
    assert set(cost) == {"CNN", "CNN, relaxed rate", "FCN", "LCN", "eFCN", "eLCN"}
    assert relax_local.PAPER.times == relax.PAPER.times
