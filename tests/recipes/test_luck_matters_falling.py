"""Figures 7 to 10: quick runs test what they can, interrupted ones go on, and each claim can hold and can fail."""

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from thalweg.cli.app import main
from thalweg.lab.claims import judge
from thalweg.lab.parts import Share
from thalweg.lab.recipe import Context
from thalweg.lab.tables import Table
from thalweg.recipes.luck_matters import falling, figure_7, figure_8, figure_9, figure_10
from thalweg.recipes.luck_matters.falling import WORDS, FallPreset, Setting, Watch, gaussian_pairs
from thalweg.recipes.luck_matters.pictures import fan_out_figures
from thalweg.teacher_student import training

HOLD = {
    figure_7: {"grows"},
    figure_8: {"grows"},
    figure_9: {"stalls"},
    figure_10: {"before", "after", "more"},
}
SMALL = {
    "fc_widths": (3, 2),
    "num_outputs": 5,
    "factor": 3,
    "epochs": 2,
    "epoch_samples": 320,
    "num_seeds": 2,
    "eval_samples": 32,
}
TINY: dict[ModuleType, Any] = {
    figure_7: figure_7.QUICK.model_copy(
        update={**SMALL, "kinds": ("fc", "cnn"), "cnn_channels": (2, 2, 3), "image_size": 8}
    ),
    figure_8: figure_8.QUICK.model_copy(
        update={
            **{**SMALL, "num_outputs": 10, "eval_samples": 1024},
            **{"kinds": ("fc", "cnn"), "cnn_channels": (2, 2), "num_train": 60, "num_test": 40, "teacher_epochs": 1},
        }
    ),
    figure_9: figure_9.QUICK.model_copy(update=SMALL),
    figure_10: figure_10.QUICK.model_copy(update=SMALL),
}


def verdicts(module: ModuleType, measured: Any) -> dict[str, str]:
    return {claim.id: claim.verdict for claim in judge(module.RECIPE.claims, measured)}


def of(found: dict[str, str], verdict: str) -> set[str]:
    return {name for name, own in found.items() if own == verdict}


@pytest.mark.parametrize("module", HOLD, ids=lambda m: m.__name__.rpartition(".")[2])
def test_quick_runs_test_some_claims_and_draw_all_figures(module: ModuleType) -> None:
    told: list[float] = []
    outcome = module.RECIPE.run(module.QUICK, Context(progress=lambda share, _: told.append(share)))
    found = verdicts(module, outcome.measured)
    assert of(found, "holds") == HOLD[module]
    assert of(found, "fails") == set()
    assert told == sorted(told)
    drawn = module.RECIPE.figures(outcome.tables)
    assert len({figure.id for figure in drawn}) == len(drawn) >= 6


@pytest.mark.parametrize("module", HOLD, ids=lambda m: m.__name__.rpartition(".")[2])
def test_an_interrupted_run_goes_on_to_the_same_tables(
    module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "_TOLD_EVERY", 0.0)
    before: list[float] = []
    after: list[float] = []

    def stop(fraction: float, _: str) -> None:
        before.append(fraction)
        if fraction > 0.7:
            raise KeyboardInterrupt

    whole = module.run(TINY[module], Context())
    with pytest.raises(KeyboardInterrupt):
        module.run(TINY[module], Context(folder=tmp_path, progress=stop))
    again = module.run(TINY[module], Context(folder=tmp_path, progress=lambda fraction, _: after.append(fraction)))
    assert again.measured == whole.measured
    assert timeless(again.tables) == timeless(whole.tables)
    assert min(after) > before[0]  # not from the start
    assert not list(tmp_path.glob("states-*"))
    assert module.figures(again.tables)


def timeless(tables: Any) -> dict[str, Table]:
    return {name: [{k: v for k, v in row.items() if k != "seconds"} for row in rows] for name, rows in tables.items()}


def course(setting: str, ends: list[float], *, ranks: tuple[float, ...] = (), others: float = 0.5) -> Table:
    """Means over seeds in which all that the paper says is so, but for what is given."""
    own = ranks or tuple(0.16 * 0.5**epoch for epoch in range(11))
    return [
        {
            "setting": setting,
            "layer": layer,
            "epoch": epoch,
            "correlation": 0.3 + (end - 0.3) * epoch / 10,
            "rank": own[epoch],
            "fan_out_winners": 1.0,
            "fan_out_others": 1.0 + (others - 1.0) * epoch / 10,
        }
        for layer, end in enumerate(ends)
        for epoch in range(11)
    ]


KINDS = ("FC, without BN", "FC, with BN", "CNN, without BN", "CNN, with BN")
ENDS = dict(zip(KINDS, ([0.995, 0.9, 0.8], [0.996, 0.95, 0.9], [0.8, 0.7, 0.6], [0.9, 0.8, 0.7]), strict=True))


def table(**changes: Any) -> Table:
    ends = ENDS | changes.get("ends", {})
    more: dict[str, Any] = changes.get("more", {})
    return [row for name, own in ends.items() for row in course(name, own, **more.get(name, {}))]


@pytest.mark.parametrize(
    ("fails", "ends", "more"),
    [
        (set(), {}, {}),
        ({"grows"}, {KINDS[3]: [0.99, 0.99, 0.29]}, {}),
        ({"lowest"}, {KINDS[0]: [0.985, 0.9, 0.8]}, {}),
        ({"ordered"}, {KINDS[0]: [0.995, 0.8, 0.85]}, {}),
        ({"lowest_norm"}, {KINDS[1]: [0.94, 0.93, 0.92]}, {}),
        ({"ordered_norm"}, {KINDS[1]: [0.96, 0.95, 0.97]}, {}),
        ({"early"}, {}, {KINDS[0]: {"ranks": tuple(0.3 * 0.5**k for k in range(11))}}),
        ({"falls"}, {}, {KINDS[0]: {"ranks": (0.15, *(0.05 + k / 1000 for k in range(10)))}}),
        ({"soon"}, {}, {KINDS[0]: {"ranks": tuple(0.15 - k / 100 for k in range(11))}}),
        ({"norm_fc"}, {KINDS[1]: [0.96, 0.85, 0.7]}, {}),
        ({"norm_cnn"}, {KINDS[3]: [0.8, 0.7, 0.5]}, {}),
        ({"fan_out"}, {}, {KINDS[2]: {"others": 0.9}}),
    ],
)
def test_each_claim_of_figure_7_holds_and_fails(fails: set[str], ends: Any, more: Any) -> None:
    found = verdicts(figure_7, figure_7.measured(table(ends=ends, more=more), is_quick=False))
    assert of(found, "fails") == fails
    assert of(found, "untested") == set()


def test_where_every_student_wins_no_fan_out_is_compared() -> None:
    rows = [{k: v for k, v in row.items() if k != "fan_out_others"} for row in table()]
    assert of(verdicts(figure_7, figure_7.measured(rows, is_quick=False)), "untested") == {"fan_out"}


def test_the_top_layer_of_each_setting_is_drawn() -> None:
    rows = [*course("FC", [0.9, 0.8]), *course("CNN", [0.9, 0.8, 0.7])]
    (figure,) = fan_out_figures(rows)
    names = {trace.name for trace in figure.plotly.data}
    assert names == {"FC: winners", "FC: others", "CNN: winners", "CNN: others"}


def labelled(gain: float) -> Table:
    rows = [(0, 0.1), (8, 0.5 + gain)]
    return [
        {"setting": name, "epoch": epoch, "accuracy": own, "teacher_accuracy": 0.5}
        for name in KINDS
        for epoch, own in rows
    ]


BEHIND = tuple(0.4 * 0.5**k for k in range(11))
BETTER = {name: {"ranks": tuple(0.1 * 0.5**k for k in range(11))} for name in KINDS[1::2]}


@pytest.mark.parametrize(
    ("fails", "gain", "ends", "more"),
    [
        (set(), 0.01, {}, BETTER),
        ({"grows"}, 0.01, {KINDS[2]: [0.3, 0.7, 0.6]}, BETTER),
        ({"accuracy"}, -0.01, {}, BETTER),
        ({"early"}, 0.01, {}, BETTER | {KINDS[0]: {"ranks": BEHIND}}),
        ({"norm_ranks"}, 0.01, {}, {KINDS[1]: BETTER[KINDS[1]]}),
    ],
)
def test_each_claim_of_figure_8_holds_and_fails(fails: set[str], gain: float, ends: Any, more: Any) -> None:
    found = verdicts(figure_8, figure_8.measured(table(ends=ends, more=more), labelled(gain)))
    assert of(found, "fails") == fails
    assert of(found, "untested") == set()


SIZES = {
    "small, without BN": [2.3, 0.9],
    "small, with BN": [0.99, 0.8],
    "large, without BN": [0.85, 0.7],
    "large, with BN": [0.95, 0.8],
    "infinite samples": [0.99, 0.9],
    "finite samples": [0.9, 0.8],
}


@pytest.mark.parametrize(
    ("fails", "untested", "changes"),
    [
        (set(), set(), {}),
        ({"faster"}, set(), {"large, without BN": [1.2, 0.7], "large, with BN": [1.5, 0.8]}),
        ({"faster"}, set(), {"small, without BN": [0.8, 1.8], "large, without BN": [0.95, 0.7]}),
        (set(), {"faster"}, {"small, without BN": [0.8, 1.8]}),
        ({"norm_hurts"}, set(), {"small, with BN": [2.4, 0.9]}),
        ({"norm_helps"}, set(), {"large, with BN": [0.8, 0.7]}),
        ({"stalls"}, set(), {"finite samples": [0.97, 0.88]}),
    ],
)
def test_each_claim_of_figure_9_holds_and_fails(fails: set[str], untested: set[str], changes: Any) -> None:
    rows = [row for name, ends in (SIZES | changes).items() for row in course(name, ends)]
    found = verdicts(figure_9, figure_9.measured(rows, 0.9))
    assert (of(found, "fails"), of(found, "untested")) == (fails, untested)


def test_what_is_covered_at_the_start_took_no_time() -> None:
    rows = [row for name, ends in SIZES.items() for row in course(name, ends)]
    for row in rows:
        row["correlation"] = 0.95 if row["setting"] == "large, without BN" else row["correlation"]
    found = figure_9.measured(rows, 0.9)["faster"]
    assert (found["ratio"], found["small"], found["large"]) == (0.0, pytest.approx(3.0), 0.0)
    for row in rows:
        row["correlation"] = 0.2 if row["setting"] == "large, without BN" else 0.95
    assert figure_9.measured(rows, 0.9)["faster"]["ratio"] == float("inf")


def ratios(before: float, after: float, beta: float) -> Table:
    cells = [("H*", "before", before), ("H*", "after", after), ("β*", "before", 1.0), ("β*", "after", beta)]
    own = [{"quantity": quantity, "when": when, "ratio": ratio} for quantity, when, ratio in cells]
    return [*own, *({**row, "ratio": None} for row in own)]  # None: of a layer with one teacher node


@pytest.mark.parametrize(
    ("fails", "values"),
    [
        (set(), (1.1, 9.0, 3.0)),
        ({"before"}, (2.2, 9.0, 3.0)),
        ({"after"}, (1.1, 4.0, 3.0)),
        ({"more"}, (1.1, 9.0, 10.0)),
    ],
)
def test_each_claim_of_figure_10_holds_and_fails(fails: set[str], values: Any) -> None:
    found = verdicts(figure_10, figure_10.measured(ratios(*values), figure_10.QUICK))
    assert of(found, "fails") == fails
    assert of(found, "untested") == set()
    short = figure_10.QUICK.model_copy(update={"epochs": 1})
    assert set(figure_10.measured(ratios(*values), short)) == {"before"}


def test_one_teacher_node_has_no_ratio() -> None:
    preset = TINY[figure_10].model_copy(
        update={
            "fc_widths": (1, 1),
            "num_outputs": 2,
            "epoch_samples": 100_000,
            "batch_size": 50_000,
            "eval_samples": 32,
        }
    )
    outcome = figure_10.run(preset, Context())
    assert {row["ratio"] for row in outcome.tables["ratios"]} == {None}
    assert outcome.measured == {}
    figure_10.figures(outcome.tables)


def test_what_the_finite_set_is_held_against_is_trained_once(monkeypatch: pytest.MonkeyPatch) -> None:
    preset, trained = TINY[figure_9], []

    def counted(own: FallPreset, setting: Setting, *rest: Any) -> Any:
        trained.append(setting.name)
        return falling.fallen(own, setting, *rest)

    monkeypatch.setattr(figure_9, "fallen", counted)
    tables = figure_9.run(preset, Context()).tables
    assert len(trained) == len(set(trained)) == 5
    assert "infinite samples" not in trained
    setting = Setting("infinite samples", "fc", preset.small_widths)
    own = falling.fallen(preset, setting, Context(), Share(Context()))
    for name, rows in own.items():
        assert [row for row in tables[name] if row["setting"] == setting.name] == rows


def test_large_feature_maps_are_evaluated_in_smaller_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = gaussian_pairs(TINY[figure_7], Setting("CNN", "cnn", (2, 2)), Context())
    student, x = pairs.students[0].eval(), pairs.evaluations[0]
    assert falling.at_once(student, x) == 1024
    whole = Watch(pairs)(0, 0, student)
    monkeypatch.setattr(falling, "_BYTES", 9 * 6 * (36 + 16) * 5)
    assert falling.at_once(student, x) == 5
    for name, value in Watch(pairs)(0, 0, student).items():
        torch.testing.assert_close(value, whole[name], rtol=1e-4, atol=1e-5)


def test_no_digit_is_trained_and_tested_on() -> None:
    preset = figure_8.QUICK.model_copy(update={"num_train": 10_000, "num_test": 10_000})
    (train, _), (test, _) = figure_8._images(preset, Context())
    assert len(train) + len(test) == 1797
    first, second = ({image.numpy().tobytes() for image in images} for images in (train, test))
    assert not first & second


@pytest.mark.parametrize(
    ("preset", "changes", "words"),
    [
        (figure_7.Figure7Preset, {"kinds": ()}, "kinds"),
        (figure_7.Figure7Preset, {"fc_widths": ()}, "fc_widths"),
        (figure_7.Figure7Preset, {"cnn_epochs": 0}, "cnn_epochs"),
        (figure_8.Figure8Preset, {"norms": ()}, "norms"),
        (figure_8.Figure8Preset, {"image_size": 24}, "images_shrunk_to"),
        (figure_8.Figure8Preset, {"num_outputs": 7}, "one a class"),
        (figure_9.Figure9Preset, {"finite_epochs": 0}, "finite_epochs"),
    ],
)
def test_what_a_run_could_not_use_is_refused(preset: Any, changes: Any, words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        preset(**changes)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["luck_matters/figure_8", "quick", "image_size=24"], "error: Expected image_size=16, which is of Gaussian "),
        (["luck_matters/figure_7", "quick", "kinds=[]"], "error: kinds: Expected at least 1 item, not 0. Got []."),
    ],
)
def test_what_is_refused_is_said_in_a_line(words: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", *words]) == 2
    assert capsys.readouterr().err.startswith(line)


def test_convolutional_students_have_rates_of_their_own() -> None:
    preset = FallPreset(learning_rate=0.05, cnn_learning_rate=1e-3)
    rates = {(kind, norm): preset.of_kind(kind, norm).learning_rate for kind in ("fc", "cnn") for norm in WORDS}
    assert rates.pop(("cnn", "none")) == 1e-3
    assert set(rates.values()) == {0.05}
    preset = FallPreset(cnn_norm_learning_rate=1e-2)
    assert {norm: preset.of_kind("cnn", norm).learning_rate for norm in WORDS} == {
        "none": 1e-4,
        "after_relu": 1e-2,
        "before_relu": 1e-2,
    }
    assert preset.of_kind("fc", "after_relu").learning_rate == 0.05
    assert FallPreset(cnn_learning_rate=None).of_kind("cnn", "none").learning_rate == 0.05
