"""Figure 5 in its quick size, on Iris: what it stores is what the paper's formulas give, and its claims can fail."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

import thalweg.data
from thalweg.data import Dataset, iris
from thalweg.errors import DataError
from thalweg.lab.claims import judge
from thalweg.lab.recipe import Context, Outcome
from thalweg.recipes.embedding_principle import figure_5
from thalweg.training import TrainingRun, stagnation

CLAIMS = {claim.id: claim.check for claim in figure_5.RECIPE.claims}


@pytest.fixture(scope="module")
def outcome() -> Outcome:
    seen: list[float] = []
    found = figure_5.run(figure_5.QUICK, Context(progress=lambda fraction, _: seen.append(fraction)))
    assert 0 <= min(seen) <= max(seen) <= 1
    assert seen == sorted(seen)
    return found


def weights(outcome: Outcome, net: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Input weights with the bias as a last column, and output weights."""
    first, bias, last = (
        outcome.arrays[f"{net} layers.{n}"].astype(np.float64) for n in ("0.weight", "0.bias", "1.weight")
    )
    return np.column_stack([first, bias]), bias, last


def forward(outcome: Outcome, net: str, inputs: np.ndarray) -> np.ndarray:
    incoming, _, outgoing = weights(outcome, net)
    with_one = np.column_stack([inputs, np.ones(len(inputs))])
    return np.maximum(with_one @ incoming.T, 0) @ outgoing.T


def flowers() -> tuple[np.ndarray, np.ndarray]:
    data = iris()
    return data.inputs.numpy(), data.targets.numpy()


def row(outcome: Outcome, net: str) -> dict[str, object]:
    return next(row for row in outcome.tables["nets"] if row["net"] == net)


def test_the_quick_preset_holds_and_leaves_the_numbers_of_mnist_untested(outcome: Outcome) -> None:
    verdicts = {claim.id: claim.verdict for claim in judge(figure_5.RECIPE.claims, outcome.measured)}
    assert verdicts == {
        "plateau": "holds",
        "groups": "untested",
        "silent": "untested",
        "width": "holds",
        "loss": "holds",
        "agreement": "untested",
    }


def test_the_reduced_net_is_the_papers_merge_of_the_full_one(outcome: Outcome) -> None:
    incoming, _, outgoing = weights(outcome, "full")
    kept, _, merged = weights(outcome, "reduced")
    members: dict[int, list[int]] = {}
    for neuron in outcome.tables["neurons"]:
        if neuron["group"] >= 0:
            members.setdefault(neuron["group"], []).append(neuron["neuron"])
    assert len(members) == len(kept)
    sizes = np.linalg.norm(incoming, axis=1)
    for group, units in members.items():
        (j,) = [unit for unit in units if np.array_equal(incoming[unit], kept[group])]
        # a_j <- sum over the group of a_k ||w_k|| / ||w_j||, with w the input weights and the bias
        expected = sum(outgoing[:, k] * sizes[k] / sizes[j] for k in units)
        np.testing.assert_allclose(merged[:, group], expected, rtol=1e-5, atol=1e-6)


def test_within_a_group_every_cosine_is_at_least_the_threshold(outcome: Outcome) -> None:
    incoming, _, _ = weights(outcome, "full")
    unit = incoming / np.linalg.norm(incoming, axis=1, keepdims=True)
    cosines = unit @ unit.T
    np.testing.assert_allclose(outcome.arrays["similarity"], cosines, atol=1e-9)
    groups = {neuron["neuron"]: neuron["group"] for neuron in outcome.tables["neurons"]}
    assert len(groups) == figure_5.QUICK.width
    alike = [cosines[a, b] for a in groups for b in groups if groups[a] == groups[b] >= 0]
    assert min(alike) >= figure_5.QUICK.similarity - 1e-12


def test_neurons_that_are_dropped_have_a_low_amplitude(outcome: Outcome) -> None:
    incoming, _, outgoing = weights(outcome, "full")
    kept, _, merged = weights(outcome, "reduced")
    largest = (np.linalg.norm(kept, axis=1) * np.linalg.norm(merged, axis=0)).max()
    amplitudes = np.linalg.norm(incoming, axis=1) * np.linalg.norm(outgoing, axis=0)
    dropped = [neuron["neuron"] for neuron in outcome.tables["neurons"] if neuron["group"] < 0]
    assert dropped
    assert amplitudes[dropped].max() <= figure_5.QUICK.amplitude * largest


@pytest.mark.parametrize("net", ["full", "reduced", "reduced, retrained"])
def test_losses_are_those_of_a_plain_forward_pass(outcome: Outcome, net: str) -> None:
    inputs, targets = flowers()
    scores = np.exp(forward(outcome, net, inputs[1::2]))
    errors = scores / scores.sum(axis=1, keepdims=True) - np.eye(3)[targets[1::2]]
    assert row(outcome, net)["loss"] == pytest.approx((errors**2).mean(), rel=1e-4)


def test_predictions_are_compared_on_the_other_flowers(outcome: Outcome) -> None:
    inputs, targets = flowers()
    names = ("full", "reduced", "reduced, retrained")
    predicted = {name: forward(outcome, name, inputs[::2]).argmax(axis=1) for name in names}
    for name in names:
        assert row(outcome, name)["accuracy"] == pytest.approx((predicted[name] == targets[::2]).mean())
        assert row(outcome, name)["agreement"] == pytest.approx((predicted[name] == predicted["full"]).mean())
    pairs = Counter(zip(predicted["full"].tolist(), predicted["reduced, retrained"].tolist(), strict=True))
    assert {(r["full"], r["reduced"]): r["samples"] for r in outcome.tables["confusion"] if r["samples"]} == pairs


def test_the_retrained_net_is_the_point_of_least_gradient(outcome: Outcome) -> None:
    (marked,) = [r for r in outcome.tables["retraining"] if r["part"] == "least gradient"]
    losses = {r["epoch"]: r["loss"] for r in outcome.tables["retraining"] if r["part"] == "reduced net"}
    assert len(losses) == figure_5.QUICK.retraining_epochs + 1
    assert marked["epoch"] >= 1
    assert marked["loss"] == losses[marked["epoch"]]
    level, loss = row(outcome, "full")["loss"], row(outcome, "reduced, retrained")["loss"]
    assert marked["loss"] == pytest.approx(loss / level)


def test_four_figures_are_drawn(outcome: Outcome) -> None:
    figures = {figure.id: figure for figure in figure_5.figures(outcome.tables)}
    assert list(figures) == ["training", "similarity", "retraining", "confusion"]
    groups = [neuron["group"] for neuron in outcome.tables["neurons"]]
    assert len(figures["similarity"].plotly.layout.shapes) == len(set(groups))
    assert {trace.name for trace in figures["training"].plotly.data} == {"training", "plateau", "reduced here"}


def test_without_a_plateau_only_that_is_judged_and_the_end_is_reduced() -> None:
    outcome = figure_5.run(figure_5.QUICK.model_copy(update={"epochs": 60}), Context())
    assert set(outcome.measured) == {"plateau"}
    assert CLAIMS["plateau"](outcome.measured["plateau"]) is False
    assert len(figure_5.figures(outcome.tables)) == 4


def stairs(levels: dict[int, float]) -> TrainingRun:
    """A recorded training that stands at a level from each of the given epochs on."""
    epochs = sorted({round(1.05**i) for i in range(200)} | {0})
    losses = [next(v for start, v in sorted(levels.items(), reverse=True) if epoch >= start) for epoch in epochs]
    thetas = torch.arange(len(epochs), dtype=torch.float32).unsqueeze(1)
    steps = torch.tensor(epochs)
    norms = torch.ones(len(epochs), dtype=torch.float64)
    curve = torch.tensor(losses, dtype=torch.float64)
    return TrainingRun(steps, curve, norms, steps, thetas, thetas[-1], "finished", epochs[-1], 0.0)


def test_the_plateau_nearest_to_the_papers_is_taken_whatever_the_pace() -> None:
    for pace in (1, 3):
        levels = {0: 0.09, 100 * pace: 1e-3, 400 * pace: 7e-4, 1_600 * pace: 3e-4}
        plateau = figure_5._nearest(stairs(levels), 6.34e-4)
        assert plateau is not None
        assert plateau.level == pytest.approx(7e-4)


def test_the_stand_before_the_first_descent_is_no_plateau() -> None:
    low = figure_5._nearest(stairs({0: 0.09, 500: 0.008}), 0.09)
    assert low is not None
    assert low.level == pytest.approx(0.008)
    assert figure_5._nearest(stairs({0: 0.09, 500: 0.02}), 0.09) is None


def test_mnist_is_normalised_and_its_numbers_are_judged_at_the_papers_size(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def small_mnist(split: str, **options: object) -> Dataset:
        """Iris in the place of images."""
        asked.append((split, options))
        data = iris(dtype=torch.float32)
        return data.select(torch.arange(int(split == "train"), 150, 2))

    monkeypatch.setattr(thalweg.data, "mnist", small_mnist)
    monkeypatch.setattr(figure_5, "_nearest", lambda training, _: stagnation(training)[0])
    preset = figure_5.CPU.model_copy(update={"epochs": 20, "retraining_epochs": 20})
    outcome = figure_5.run(preset, Context(data_root=Path("somewhere")))
    common = {"data_root": Path("somewhere"), "normalize": True}
    assert asked == [("train", {"num_samples": 1_000, **common}), ("test", {"num_samples": 10_000, **common})]
    assert set(outcome.measured) == set(CLAIMS)
    assert len(outcome.tables["neurons"]) <= figure_5.DRAWN
    assert outcome.arrays["similarity"].shape == (400, 400)


def test_more_flowers_than_there_are_are_refused() -> None:
    with pytest.raises(DataError, match=r"Expected between 1 and 75 samples of iris\. Got 76"):
        figure_5.run(figure_5.QUICK.model_copy(update={"num_train": 76}), Context())


def test_each_claim_can_fail_and_the_papers_own_numbers_hold() -> None:
    paper = {
        "plateau": {"start": 0.09, "plateau": 6.34e-4},
        "groups": 58,
        "silent": 110,
        "width": {"before": 400, "after": 58},
        "loss": {"plateau": 6.34e-4, "reduced net": 6.34e-4},
        "agreement": 0.985,
    }
    wrong = {
        "plateau": {"start": 0.09, "plateau": 0.0091},
        "groups": 91,
        "silent": 79,
        "width": {"before": 400, "after": 200},
        "loss": {"plateau": 6.34e-4, "reduced net": 6.7e-4},
        "agreement": 0.9699,
    }
    assert set(paper) == set(wrong) == set(CLAIMS)
    for name, check in CLAIMS.items():
        assert check(paper[name]) is True
        assert check(wrong[name]) is False
