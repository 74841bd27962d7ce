"""The trade-off: what each width keeps of a network, measured on all data, and the choice of one."""

import itertools
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.embeddings.nets import deep_net
from torch import Tensor, nn

from thalweg.embeddings import compare, embed, find_merges, pick, reduce, trade_off
from thalweg.embeddings.tradeoff import AMPLITUDES, LEVELS
from thalweg.errors import DataError, NumericalError, PlanError, ShapeError, StructureError
from thalweg.nets import CNN, BlockWidths, EncoderClassifier, ResNet
from thalweg.objective import Objective
from thalweg.structure import trace

CASES = {
    "mlp": (lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 4)), (3,)),
    "cnn": (lambda: CNN((2, 3), hidden=(4,), image_size=8, num_classes=4, norm="batch"), (1, 8, 8)),
    "resnet": (lambda: ResNet(stem=2, channels=(2, 3), hidden=((2,), (3, 2)), num_classes=4), (3, 6, 6)),
    "transformer": (
        lambda: EncoderClassifier(
            num_features=3, num_tokens=4, dim=4, blocks=[BlockWidths(2, 3, 2, 5)], num_classes=4
        ),
        (4, 3),
    ),
}


def drawn(net: nn.Module, seed: int = 0) -> nn.Module:
    """Draw weights and running statistics, so that no unit is like another."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*net.double().named_parameters(), *net.named_buffers()]:
            if tensor.is_floating_point():
                tensor.normal_(generator=generator)
                if name.endswith("running_var"):
                    tensor.abs_().add_(0.5)
    return net.eval()


def classified(shape: tuple[int, ...], count: int = 40) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(11)
    x = torch.randn(count, *shape, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 4, (count,), generator=generator)


def widened(name: str, noise: float = 0.0) -> tuple[nn.Module, dict[str, int], Objective]:
    """Give a network embedded into twice its width, its widths before, and data."""
    build, shape = CASES[name]
    pair = classified(shape)
    narrow = drawn(build())
    view = trace(narrow, pair[0][:4])
    widths = {}
    for group in view.groups:
        if group.is_duplicable:
            with suppress(StructureError):  # the transformer's code fixes its number of heads
                embed(narrow, pair[0][:4], {group.name: 2 * group.size}, view=view)
                widths[group.name] = group.size
    wide = embed(narrow, pair[0][:4], {n: 2 * w for n, w in widths.items()}, view=view).module
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in wide.parameters():
            p.add_(noise * torch.randn(p.shape, generator=generator, dtype=torch.float64) * p.abs())
    return wide, widths, Objective(wide, nn.CrossEntropyLoss(), pair, batch_size=16)


@pytest.mark.parametrize("name", CASES)
def test_what_an_embedding_made_is_undone_by_the_first_point_and_chosen(name: str) -> None:
    _, widths, objective = widened(name)
    curve = trade_off(objective, objective.theta(), levels=[0.9])
    equal, best = curve.points[1], pick(curve, min_agreement=1.0)
    assert equal.similarity is None
    for found in (equal, best):
        assert {n: found.widths[n] for n in widths} == widths
        assert found.agreement == 1.0
    assert equal.comparison.max_change <= 1e-12
    assert equal.comparison.loss == pytest.approx(curve.before.comparison.loss, rel=1e-12)
    assert curve.before.agreement == 1.0
    assert curve.before.is_dominated


@pytest.mark.parametrize("name", ["cnn", "resnet"])
def test_units_that_nearly_agree_are_merged_at_a_level_and_most_predictions_stay(name: str) -> None:
    _, widths, objective = widened(name, noise=1e-4)
    curve = trade_off(objective, objective.theta(), levels=[0.9999])
    equal, near = curve.points[1:3]
    assert equal.num_units == curve.before.num_units
    assert {n: near.widths[n] for n in widths} == widths
    assert near.agreement >= 0.95
    assert 0 < near.comparison.max_change < 0.05


@pytest.mark.parametrize("kind", ["labels", "one-hot", "numbers"])
def test_every_number_is_what_a_plain_loop_over_all_data_gives(kind: str) -> None:
    net = deep_net([3, 12, 9, 4], "relu", torch.Generator().manual_seed(2))
    x, labels = classified((3,), 50)
    loss = nn.CrossEntropyLoss() if kind == "labels" else nn.MSELoss()
    hot = nn.functional.one_hot(labels, 4).double()
    y = {"labels": labels, "one-hot": hot, "numbers": hot * 0.7 + x[:, :1]}[kind]
    objective = Objective(net, loss, (x, y), batch_size=7)
    curve = trade_off(objective, objective.theta(), levels=[0.95, 0.9, 0.8, 0.7, 0.5])
    assert len({p.num_units for p in curve.points}) >= 5  # else there is nothing to compare
    with torch.no_grad():
        own = net(x)
        for point in curve.points[1:]:
            narrow = reduce(net, x, similarity=point.similarity, amplitude=point.amplitude, view=curve.view)
            out, found = narrow.module(x), point.comparison
            assert point.widths == {n: after for n, (_, after) in narrow.reduction.widths.items()}
            assert point.num_params == sum(p.numel() for p in narrow.module.parameters())
            assert found.loss == pytest.approx(float(loss(out, y)), rel=1e-12)
            change = (out - own).abs()
            assert found.max_change == pytest.approx(float(change.max() / own.abs().max()), rel=1e-10, abs=1e-14)
            assert found.mean_change == pytest.approx(float(change.mean() / own.abs().mean()), rel=1e-10, abs=1e-14)
            if kind == "numbers":
                spread = float(((own - own.mean(0)) ** 2).sum())
                expected = max(0.0, 1 - float((change**2).sum()) / spread)
                assert (found.accuracy, found.kind) == (None, "outputs")
            else:
                expected = float((out.argmax(1) == own.argmax(1)).double().mean())
                assert found.accuracy == pytest.approx(float((out.argmax(1) == labels).double().mean()), abs=1e-12)
                assert found.kind == "predictions"
            assert found.agreement == pytest.approx(expected, rel=1e-10, abs=1e-12)


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(["relu", "tanh"]), st.sampled_from([0.0, 0.3, 0.8]))
def test_no_group_grows_as_the_level_falls_and_the_frontier_is_monotone(
    seed: int, activation: str, amplitude: float
) -> None:
    net = deep_net([2, 9, 7, 3], activation, torch.Generator().manual_seed(seed))
    x = torch.randn(20, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    objective = Objective(net, nn.CrossEntropyLoss(), (x, torch.arange(20) % 3))
    curve = trade_off(objective, objective.theta(), amplitudes=[amplitude])
    levels = curve.points[1:]
    assert [p.similarity for p in levels] == [None, *LEVELS]
    for higher, lower in itertools.pairwise(levels):
        assert all(lower.widths[name] <= width for name, width in higher.widths.items())
    sizes = [(p.num_units, p.agreement) for p in curve.frontier]
    assert sizes == sorted(set(sizes), reverse=True)
    assert all(one[1] > two[1] for one, two in itertools.pairwise(sizes))
    for point in curve.points:
        outdone = any(f.num_units <= point.num_units and f.agreement >= point.agreement for f in curve.frontier)
        assert outdone
        assert point.is_dominated == (point not in curve.frontier)


def test_the_loudest_unit_of_a_cluster_stays() -> None:
    net = nn.Sequential(nn.Linear(2, 3, bias=False), nn.ReLU(), nn.Linear(3, 1, bias=False)).double()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0, 0.0], [1.0, 0.1], [-1.0, 0.0]]))
        net[2].weight.copy_(torch.tensor([[0.1, 5.0, 1.0]]))
    found = find_merges(trace(net, torch.zeros(2, 2)), dict(net.named_parameters()), similarity=0.9).merges["0"]
    assert found.kept.tolist() == [1, 2]
    assert found.labels.tolist() == [0, 0, 1]
    np.testing.assert_allclose(found.ratios, [1 / 1.01**0.5, 1, 1])


def test_under_an_average_a_level_that_gives_nothing_leaves_the_merge_above_it() -> None:
    """Clusters of sizes 2, 2, 2 at a high level, of 4 and 2 at a lower one, which an average forbids."""
    angles = torch.tensor([0.0, 0.0, 0.3, 0.3, 2.5, 2.5], dtype=torch.float64)
    net = nn.Sequential(nn.Linear(2, 6, bias=False), nn.LayerNorm(6), nn.Linear(6, 2)).double()
    with torch.no_grad():
        net[0].weight.copy_(torch.stack([angles.cos(), angles.sin()], dim=1))
    x = torch.randn(10, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    view = trace(net, x)
    assert [g.coupling for g in view.groups] == ["average"]
    state = dict(net.named_parameters())
    assert find_merges(view, state, similarity=0.9).merges == {}
    objective = Objective(net, nn.MSELoss(), (x, x))
    curve = trade_off(objective, objective.theta(), levels=[0.99, 0.9], view=view)
    assert [p.num_units for p in curve.points] == [6, 3, 3, 3, 3, 3]
    assert curve.points[-1].agreement == pytest.approx(1.0, abs=1e-12)


def test_frozen_parameters_buffers_and_the_module_itself_are_left_as_they_are() -> None:
    wide, _, _ = widened("cnn")
    wide.features[0].weight.requires_grad_(False)
    before = {n: t.clone() for n, t in wide.state_dict().items()}
    objective = Objective(wide, nn.CrossEntropyLoss(), classified((1, 8, 8)))
    curve = trade_off(objective, objective.theta(), levels=[0.9], groups=["features.4"])
    assert {n: w for n, w in curve.points[1].widths.items()}["features.4"] == 3
    assert curve.points[1].comparison.max_change <= 1e-12
    for name, tensor in wide.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)


def test_it_is_the_given_point_that_is_reduced() -> None:
    net = deep_net([2, 6, 2], "relu", torch.Generator().manual_seed(0))
    x = torch.randn(8, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    objective = Objective(net, nn.MSELoss(), (x, x))
    theta = objective.theta()
    theta[2:12] = theta[:2].repeat(5)  # all incoming weights like those of the first unit
    theta[12:18] = theta[12]
    curve = trade_off(objective, theta, levels=[0.9])
    assert curve.points[1].num_units == 1
    assert curve.points[1].comparison.max_change <= 1e-12
    assert float(curve.before.comparison.loss) == pytest.approx(float(objective.value(theta)), rel=1e-12)


class FixedSize(nn.Module):
    """The code says the size of the first layer; the second is free."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.out = nn.Linear(3, 4), nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.two(self.one(x).tanh().reshape(-1, 4)).relu())


def test_a_group_whose_size_the_code_fixes_is_kept_and_the_reason_given() -> None:
    net = drawn(FixedSize())
    with torch.no_grad():
        net.one.weight[1], net.one.bias[1] = net.one.weight[0], net.one.bias[0]
        net.two.weight[1], net.two.bias[1] = net.two.weight[0], net.two.bias[0]
    objective = Objective(net, nn.CrossEntropyLoss(), (torch.randn(5, 3, dtype=torch.float64), torch.arange(5) % 2))
    curve = trade_off(objective, objective.theta(), levels=[0.9])
    assert list(curve.kept) == ["one"]
    assert curve.kept["one"].startswith("Expected the resized module to run. Got RuntimeError")
    assert curve.points[1].widths == {"one": 4, "two": 5}
    with pytest.raises(StructureError, match=r"Expected the resized module to run"):
        trade_off(objective, objective.theta(), levels=[0.9], groups=["one"])


def small() -> Objective:
    net = deep_net([2, 12, 2], "relu", torch.Generator().manual_seed(5))
    x = torch.randn(30, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return Objective(net, nn.MSELoss(), (x, x), batch_size=8)


def test_the_narrowest_point_within_both_tolerances_is_picked() -> None:
    objective = small()
    curve = trade_off(objective, objective.theta())
    for least in (1.0, 0.9, 0.5, 0.0):
        good = [p for p in curve.points if p.agreement >= least]
        assert pick(curve, min_agreement=least).num_units == min(p.num_units for p in good)
    loss = curve.before.comparison.loss
    bounded = pick(curve, min_agreement=0.0, max_loss_increase=0.05)
    assert bounded.num_units == min(p.num_units for p in curve.points if p.comparison.loss <= 1.05 * loss)
    assert pick(curve, min_agreement=1.0, max_loss_increase=0.0).num_units == 12


def test_an_agreement_that_rounding_puts_below_the_bound_is_good_enough() -> None:
    """1 - 0.18 is 0.8200000000000001; the next lower share of 100 samples stays out."""
    objective = small()
    curve = trade_off(objective, objective.theta(), levels=[0.9])
    for right, is_picked in ((82, True), (81, False)):
        comparison = replace(curve.before.comparison, agreement=right / 100)
        narrow = replace(curve.before, num_units=3, comparison=comparison)
        found = pick(replace(curve, points=(curve.before, narrow)), min_agreement=1 - 0.18)
        assert (found is narrow) == is_picked


@pytest.mark.parametrize(
    ("tolerances", "message"),
    [
        ({"min_agreement": 1.2}, r"an agreement in \[0, 1\]. Got 1.2"),
        ({"min_agreement": float("nan")}, r"an agreement in \[0, 1\]. Got nan"),
        ({"max_loss_increase": -0.1}, r"an increase of the loss of at least 0. Got -0.1"),
    ],
)
def test_a_tolerance_out_of_range_is_refused(tolerances: dict[str, float], message: str) -> None:
    objective = small()
    with pytest.raises(PlanError, match=message):
        pick(trade_off(objective, objective.theta(), levels=[0.9]), **tolerances)


def test_what_does_not_fit_is_refused_before_anything_is_reduced() -> None:
    objective = small()
    theta, x = objective.theta(), torch.randn(4, 2, dtype=torch.float64)
    with pytest.raises(PlanError, match=r"a similarity in \(0, 1\]. Got 0.0"):
        trade_off(objective, theta, levels=[0.0])
    with pytest.raises(PlanError, match=r"an amplitude in \[0, 1\). Got 1.0"):
        trade_off(objective, theta, amplitudes=[1.0])
    with pytest.raises(StructureError, match=r"one of the groups 0. Got 'no'"):
        trade_off(objective, theta, groups=["no"])
    with pytest.raises(ShapeError, match=r"Expected theta of shape \(62,\)"):
        trade_off(objective, theta[1:])
    with pytest.raises(NumericalError, match=r"Expected finite outputs"):
        trade_off(objective, theta * torch.inf)
    with pytest.raises(DataError, match=r"Expected finite inputs"):
        trade_off(Objective(objective.module, nn.MSELoss(), (x * torch.nan, x)), theta)


def test_progress_rises_to_the_end() -> None:
    objective, seen = small(), []
    trade_off(objective, objective.theta(), progress=lambda fraction, text: seen.append((fraction, text)))
    fractions = [fraction for fraction, _ in seen]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0
    assert "narrow networks built and proved" in seen[0][1]
    assert "30 samples through" in seen[-1][1]


def test_labels_that_the_loss_ignores_count_in_no_agreement() -> None:
    net = deep_net([2, 5, 3], "tanh", torch.Generator().manual_seed(0))
    x = torch.randn(20, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y = torch.arange(20) % 3
    other = reduce(net, x, similarity=0.1).module
    kept = y.clone()
    kept[::2] = -100
    half = compare(*_at(net, (x, kept)), [other])[1]
    alone = compare(*_at(net, (x[1::2], y[1::2])), [other])[1]
    assert (half.agreement, half.accuracy) == (alone.agreement, alone.accuracy)


def _at(net: nn.Module, pair: tuple[Tensor, Tensor]) -> tuple[Objective, Tensor]:
    objective = Objective(net, nn.CrossEntropyLoss(), pair)
    return objective, objective.theta()


def test_outputs_that_differ_in_shape_from_batch_to_batch_have_one_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    net, other = (deep_net([1, 1], "tanh", generator) for _ in range(2))
    batches = [torch.randn(3, n, 1, generator=generator, dtype=torch.float64) for n in (4, 4, 2, 5)]
    objective = Objective(net, nn.MSELoss(), [(b, b) for b in batches], batch_weight=Tensor.numel)
    found = compare(objective, objective.theta(), [other])[1]
    with torch.no_grad():
        own, out = (torch.cat([n(b).reshape(-1) for b in batches]) for n in (net, other))
    expected = max(0.0, 1 - float(((out - own) ** 2).sum() / ((own - own.mean()) ** 2).sum()))
    assert found.agreement == pytest.approx(expected, rel=1e-12, abs=1e-14)
    assert compare(objective, objective.theta(), [net])[1].agreement == 1.0


def test_constant_outputs_agree_only_with_themselves() -> None:
    net, other = (nn.Linear(2, 1).double() for _ in range(2))
    with torch.no_grad():
        net.weight.zero_()
    objective = Objective(net, nn.MSELoss(), (torch.ones(3, 2), torch.ones(3, 1)), dtype=torch.float64)
    assert [c.agreement for c in compare(objective, objective.theta(), [net, other])] == [1.0, 1.0, 0.0]


def test_networks_with_other_outputs_are_not_compared() -> None:
    net = nn.Linear(2, 3).double()
    objective = Objective(net, lambda o, t: o.square().mean(), (torch.ones(3, 2), torch.ones(3, 3)))
    with pytest.raises(ShapeError, match=r"Expected outputs of shape \[\(3, 3\)\]. Got \[\(3, 1\)\]"):
        compare(objective, objective.theta(), [nn.Linear(2, 1).double()])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("loss", [nn.MSELoss(), nn.CrossEntropyLoss()])
def test_networks_whose_outputs_are_not_finite_are_not_compared(loss: nn.Module, bad: float) -> None:
    net, other = (deep_net([2, 4, 3], "tanh", torch.Generator().manual_seed(seed)) for seed in (0, 1))
    x = torch.randn(10, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y = torch.arange(10) % 3 if isinstance(loss, nn.CrossEntropyLoss) else x[:, :1].expand(-1, 3)
    objective = Objective(net, loss, (x, y), batch_size=10)
    with torch.no_grad():
        other[-1].bias[1] = bad
    message = r"Expected finite outputs of module 2 of those compared\. Got 10 of 30 in a batch"
    with pytest.raises(NumericalError, match=message):
        compare(objective, objective.theta(), [net, other])
    with pytest.raises(NumericalError, match=r"outputs of the network at theta\. Got 30 of 30"):
        compare(objective, objective.theta() * torch.nan, [net])


def test_a_sum_is_added_up_and_not_divided() -> None:
    net = deep_net([2, 4, 2], "tanh", torch.Generator().manual_seed(0))
    x = torch.randn(9, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    objective = Objective(net, nn.MSELoss(reduction="sum"), (x, x), batch_size=4)
    found = compare(objective, objective.theta(), [net])
    assert found[1].loss == pytest.approx(float(((net(x).detach() - x) ** 2).sum()), rel=1e-12)


def test_the_defaults_begin_with_what_changes_nothing_and_hold_the_papers_level() -> None:
    assert AMPLITUDES[0] == 0.0
    assert 0.9 in LEVELS
    assert list(LEVELS) == sorted(LEVELS, reverse=True)
