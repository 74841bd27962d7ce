"""General compatible embeddings: the paper's two conditions, slow and plain, and what follows from them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import null_space
from tests.embeddings.nets import ACTIVATIONS, data, deep_net, landscape, worst
from tests.embeddings.test_depth import critical_net
from tests.embeddings.test_splitting import RIGID, loss_of_anything
from tests.random_nets import random_net
from tests.zoo import CASES
from torch import Tensor, nn

from thalweg.data import three_tanh
from thalweg.embeddings import (
    CompatibleEmbedding,
    Embedding,
    Plan,
    Split,
    freedom,
    random_compatible,
    reduce,
    split_plan,
)
from thalweg.errors import PlanError, ShapeError
from thalweg.objective import Objective
from thalweg.probes import inertia, spectrum
from thalweg.space import Space
from thalweg.structure import trace
from thalweg.structure.tree import FloatArray, IntArray

seeds = st.integers(0, 10_000)


def drawn(
    net: nn.Module, x: Tensor, added: list[int], generator: torch.Generator, scale: float = 1.0
) -> CompatibleEmbedding:
    """A random compatible embedding of a net into one that is wider at every hidden layer."""
    view = trace(net, x)
    widths = {g.name: g.size + more for g, more in zip(view.groups, added, strict=False)}
    plan = split_plan(view, widths, shares="random", generator=generator)
    return random_compatible(Embedding(view, Space.of(net), plan), generator, scale=scale)


@settings(max_examples=12)
@given(
    seeds,
    st.lists(st.integers(1, 4), min_size=2, max_size=4),
    st.sampled_from(sorted(ACTIVATIONS)),
    st.lists(st.integers(1, 3), min_size=4, max_size=4),
)
def test_outputs_risk_and_gradient_identities_hold_at_any_point(seed, hidden, activation, added) -> None:
    generator = torch.Generator().manual_seed(seed)
    net = deep_net([2, *hidden, 1 + seed % 3], activation, generator)
    pairs = data(net, generator)
    embedding = drawn(net, pairs[0], added, generator)
    assert all(float(d.abs().max()) > 1e-3 for d in embedding.deviations.values())
    narrow, wide = landscape(net, pairs), landscape(embedding.wide(net), pairs)
    theta = embedding.apply(narrow.theta())
    torch.testing.assert_close(theta, wide.theta(), rtol=0, atol=0)
    assert worst(wide.outputs(theta), narrow.outputs(narrow.theta())) <= 1e-12
    torch.testing.assert_close(wide.value(theta), narrow.value(narrow.theta()), rtol=1e-12, atol=0)
    predicted = embedding.gradient(narrow.gradient(narrow.theta()))
    assert worst(wide.gradient(theta), predicted) <= 1e-10


@pytest.mark.parametrize("seed", range(5))
def test_a_drawn_embedding_is_the_papers_index_map_with_its_alpha_and_beta(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    net = deep_net([2, 3, 2, 4, 2], "tanh", generator)
    x, _ = data(net, generator)
    embedding = drawn(net, x, [2, 3, 4], generator)
    names = ["0.weight", "2.weight", "4.weight", "6.weight"]
    splits = [Split(2, np.arange(2), np.ones(2)), *embedding.embedding.plan.splits.values()]
    splits.append(Split(2, np.arange(2), np.ones(2)))
    made = embedding.state(dict(net.named_parameters()))
    for name, below, above in zip(names, splits, splits[1:], strict=False):
        weight, alpha = net.get_parameter(name).detach(), embedding.factors(name)
        papers_conditions(alpha, below, above)
        for j in range(above.wide):
            for k in range(below.wide):
                expected = alpha[j, k] * weight[above.parents[j], below.parents[k]]
                torch.testing.assert_close(made[name][j, k].detach(), expected, rtol=1e-13, atol=1e-14)


def papers_conditions(alpha: Tensor, below: Split, above: Split) -> None:
    """Both conditions, sum by sum; β are the shares of the split."""
    for j in range(above.wide):
        for i in range(below.narrow):
            total = sum(float(alpha[j, k]) for k in range(below.wide) if below.parents[k] == i)
            assert abs(total - 1) <= 1e-12
    for k in range(below.wide):
        for s in range(above.narrow):
            mine = [j for j in range(above.wide) if above.parents[j] == s]
            total = sum(float(above.shares[j]) * float(alpha[j, k]) for j in mine)
            assert abs(total - below.shares[k]) <= 1e-12


@settings(max_examples=8)
@given(seeds)
def test_random_networks_of_any_shape_keep_outputs_and_gradient(seed: int) -> None:
    module, inputs = random_net(seed)
    view = trace(module.double(), inputs)
    widths = {g.name: (2 if g.coupling == "average" else 1) * g.size * 2 for g in view.groups if g.is_duplicable}
    check(module, tuple(x.double() for x in inputs), widths, seed)


def check(module: nn.Module, inputs: tuple[Tensor, ...], widths: dict[str, int], seed: int) -> dict[str, int]:
    """Split at random (evenly under an average), deviate at random, and compare; return the freedom."""
    generator = torch.Generator().manual_seed(seed)
    view = trace(module, inputs)
    uneven = {n: w for n, w in widths.items() if view.group(n).coupling != "average"}
    even = {n: w for n, w in widths.items() if n not in uneven}
    splits = split_plan(view, uneven, shares="random", generator=generator).splits
    plan = Plan({**splits, **split_plan(view, even).splits})
    embedding = random_compatible(Embedding(view, Space.of(module), plan), generator)
    narrow = Objective(module, loss_of_anything, [(inputs, torch.zeros(1))])
    wide = Objective(embedding.wide(module), loss_of_anything, [(inputs, torch.zeros(1))])
    theta = embedding.apply(narrow.theta())
    torch.testing.assert_close(wide.value(theta), narrow.value(narrow.theta()), rtol=1e-11, atol=1e-12)
    assert worst(wide.gradient(theta), embedding.gradient(narrow.gradient(narrow.theta()))) <= 1e-10
    assert sorted(embedding.deviations) == sorted(freedom(embedding.embedding))
    return freedom(embedding.embedding)


# Networks of the zoo with weights between split groups, and how many numbers are free when all groups double.
FREE = {
    "mlp": {"2.weight": 35},
    "vgg": {"4.weight": 315, "9.weight": 168},
    "grouped_conv": {"2.weight": 540, "4.weight": 210},
    "group_norm": {"3.weight": 1080},
    "squeeze_excite": {"squeeze.weight": 18, "excite.weight": 18},
    "unet": {"down2.weight": 216, "up.weight": 450},
    "shared_layer": {"shared.weight": 36},
    "frozen_parameters": {"second.weight": 35},
    "registered_buffer": {"second.weight": 35},
    "gated_mlp": {"gate.weight": 35, "up.weight": 35, "down.weight": 35},
    "lstm": {"lstm.weight_hh_l0": 144},
    "gru": {"gru.weight_hh_l0": 75},
    "resnet": {
        "3.conv1.weight": 180, "3.conv2.weight": 180, "4.conv1.weight": 252, "4.conv2.weight": 378,
        "4.shortcut.0.weight": 24, "5.conv1.weight": 486, "5.conv2.weight": 486,
    },
    "weight_norm": {},
    "tied_autoencoder": {},
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(FREE))
def test_all_groups_of_the_zoo_at_once(name: str) -> None:
    module = CASES[name].build().double()
    inputs = tuple(x.double() if x.is_floating_point() else x for x in CASES[name].example())
    view = trace(module, inputs)
    widths = {g.name: 2 * g.size for g in view.groups if g.is_duplicable and (name, g.name) not in RIGID}
    assert check(module, inputs, widths, 3) == FREE[name]


class Masked(nn.Module):
    """A weight times a matrix, entry by entry, and a weight per head."""

    def __init__(self, *, trainable: bool) -> None:
        super().__init__()
        self.first, self.weight, self.last = nn.Linear(2, 3), nn.Parameter(torch.randn(4, 3)), nn.Linear(4, 2)
        self.mask = nn.Parameter(torch.rand(4, 3) + 0.5, requires_grad=trainable)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(nn.functional.linear(torch.tanh(self.first(x)), self.weight * self.mask)))


def test_a_weight_under_a_mask_deviates_only_if_the_mask_is_frozen() -> None:
    inputs = (torch.randn(5, 2, dtype=torch.float64),)
    for trainable in (True, False):
        module = Masked(trainable=trainable).double()
        widths = {g.name: 2 * g.size for g in trace(module, inputs).groups}
        found = check(module, inputs, widths, 0)
        assert (found == {}) == trainable


class PerHead(nn.Module):
    """Every head has a matrix of its own from its inner units to others; heads and inner units grow."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 6)
        self.inner = nn.Parameter(torch.randn(2, 4, 3))
        self.last = nn.Parameter(torch.randn(1, 2, 4))

    def forward(self, x: Tensor) -> Tensor:
        heads = self.inner.shape[0]
        h = torch.tanh(self.first(x)).unflatten(-1, (heads, -1))
        return torch.einsum("bhi,ohi->bo", torch.tanh(torch.einsum("bhi,hoi->bho", h, self.inner)), self.last)


def test_units_that_a_weight_keeps_apart_do_not_trade() -> None:
    module, inputs = PerHead().double(), (torch.randn(5, 2, dtype=torch.float64),)
    view = trace(module, inputs)
    groups = {g.size: g.name for g in view.groups if g.is_duplicable}
    assert sorted(groups) == [2, 3, 4]
    assert check(module, inputs, {groups[2]: 4, groups[3]: 6}, 0) == {}
    assert check(module, inputs, {groups[3]: 6, groups[4]: 8}, 0) == {"inner": 2 * 4 * 3}
    assert check(module, inputs, {groups[2]: 4, groups[3]: 6, groups[4]: 8}, 0) == {"inner": 4 * 4 * 3}


def split_of(widths: list[int], wide: dict[str, int], parents: dict[str, list[int]] | None = None) -> Embedding:
    generator = torch.Generator().manual_seed(1)
    net = deep_net(widths, "tanh", generator)
    view = trace(net, data(net, generator)[0])
    return Embedding(
        view, Space.of(net), split_plan(view, wide, shares="random", parents=parents, generator=generator)
    )


def test_the_draws_span_as_many_dimensions_as_are_free() -> None:
    split = split_of([2, 2, 3, 1], {"0": 5, "2": 5})
    free = freedom(split)
    assert free == {"2.weight": 3 * 2}
    generator = torch.Generator().manual_seed(0)
    rows = [random_compatible(split, generator).deviations["2.weight"].flatten() for _ in range(9)]
    assert int(torch.linalg.matrix_rank(torch.stack(rows))) == free["2.weight"]


def solutions(below: IntArray, above: IntArray, beta: FloatArray) -> tuple[FloatArray, FloatArray]:
    """All (α_l, β_{l-1}) that meet the paper's conditions for given β_l: one of them, and a basis of differences."""
    tops, bottoms = len(above), len(below)
    rows, right = [], []
    for j in range(tops):
        for i in range(below.max() + 1):
            row = np.zeros((tops, bottoms))
            row[j, below == i] = 1
            rows.append(np.append(row.ravel(), np.zeros(bottoms)))
            right.append(1.0)
    for s in range(above.max() + 1):
        for k in range(bottoms):
            row, share = np.zeros((tops, bottoms)), np.zeros(bottoms)
            row[above == s, k], share[k] = beta[above == s], -1
            rows.append(np.append(row.ravel(), share))
            right.append(0.0)
    matrix = np.stack(rows)
    return np.linalg.lstsq(matrix, np.array(right), rcond=None)[0], null_space(matrix)


@pytest.mark.parametrize("seed", range(3))
def test_whatever_meets_the_papers_conditions_is_a_split_with_deviations(seed: int) -> None:
    draw = np.random.default_rng(seed)
    parents = {"0": np.array([0, 1, 0, 1, 0]), "2": np.array([0, 1, 2, 0, 1, 1])}
    beta_above = split_of([2, 2, 3, 2], {"2": 6}, {"2": parents["2"].tolist()}).plan.splits["2"].shares
    particular, basis = solutions(parents["0"], parents["2"], beta_above)
    assert basis.shape[1] == 3 + (1 + 2) * (2 + 1)  # added units below, and (c-1)(d-1) summed over blocks
    found = particular + basis @ draw.normal(size=basis.shape[1])
    alpha, beta = found[:-5].reshape(6, 5), found[-5:]
    np.testing.assert_allclose([beta[parents["0"] == i].sum() for i in (0, 1)], 1, atol=1e-12)
    net = deep_net([2, 2, 3, 2], "tanh", torch.Generator().manual_seed(1))
    view = trace(net, torch.randn(5, 2, generator=torch.Generator().manual_seed(0)))
    plan = Plan({"0": Split(2, parents["0"], beta), "2": Split(3, parents["2"], beta_above)})
    deviation = torch.from_numpy(alpha - beta)
    made = CompatibleEmbedding(Embedding(view, Space.of(net), plan), {"2.weight": deviation})
    torch.testing.assert_close(made.factors("2.weight"), torch.from_numpy(alpha))


def test_null_units_have_no_freedom_and_stay_null() -> None:
    split = split_of([2, 2, 2, 1], {"0": 5, "2": 4}, {"0": [0, 1, 0, 1, -1]})
    drawn = random_compatible(split, torch.Generator().manual_seed(0))
    assert freedom(split) == {"2.weight": 2 * 2}
    assert not drawn.factors("2.weight")[:, 4].any()
    bad = torch.zeros(4, 5, dtype=torch.float64)
    bad[0, 4] = 1.0
    with pytest.raises(PlanError, match=r"no deviation of '2\.weight' at null units. Got one along dim 1"):
        CompatibleEmbedding(split, {"2.weight": bad})


def test_reducing_undoes_a_compatible_embedding() -> None:
    generator = torch.Generator().manual_seed(6)
    net = deep_net([2, 3, 2, 4, 2], "tanh", generator)
    x, _ = data(net, generator)
    wide = drawn(net, x, [3, 2, 4], generator).wide(net)
    back = reduce(reduce(reduce(wide, x).module, x).module, x)
    assert [m.out_features for m in back.module if isinstance(m, nn.Linear)] == [3, 2, 4, 2]
    torch.testing.assert_close(back.module(x), net(x), rtol=1e-11, atol=1e-12)


def critical_three_layers() -> tuple[nn.Sequential, Objective]:
    """The critical point of width 2 of the paper's data, in three layers: its units, mixed, through a ReLU."""
    flat, objective = critical_net(output_bias=True, width=2)
    mix = torch.tensor([[1.0, 0.5], [-0.3, 1.0]], dtype=torch.float64)
    shift = torch.full((2,), 3.0, dtype=torch.float64)
    net = nn.Sequential(nn.Linear(1, 2), nn.Tanh(), nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1)).double()
    with torch.no_grad():
        net[0].load_state_dict(flat[0].state_dict())
        net[2].weight.copy_(mix)
        net[2].bias.copy_(shift)
        net[4].weight.copy_(flat[2].weight @ torch.linalg.inv(mix))
        net[4].bias.copy_(flat[2].bias - net[4].weight @ shift)
    samples = three_tanh()
    return net, Objective(net, objective.loss, (samples.inputs.double(), samples.targets.double()))


def test_a_critical_point_stays_critical_and_no_eigenvalue_count_falls() -> None:
    net, narrow = critical_three_layers()
    assert float(narrow.gradient(narrow.theta()).abs().sum()) <= 1e-11
    before = inertia(spectrum(narrow, narrow.theta()), 1e-11)
    for seed in range(4):
        embedding = drawn(net, three_tanh().inputs.double(), [1 + seed % 2, 2], torch.Generator().manual_seed(seed))
        wide = Objective(
            embedding.wide(net), narrow.loss, (three_tanh().inputs.double(), three_tanh().targets.double())
        )
        assert float(wide.gradient(wide.theta()).abs().sum()) <= 1e-10
        after = inertia(spectrum(wide, wide.theta()), 1e-11)
        added, free = embedding.embedding.plan.num_added, freedom(embedding.embedding)["2.weight"]
        assert after.negative >= before.negative
        assert after.positive >= before.positive
        assert after.zero >= before.zero + added + free


def test_a_deviation_that_breaks_a_condition_is_refused() -> None:
    split = split_of([2, 2, 2, 1], {"0": 4, "2": 4})
    shares = torch.from_numpy(split.plan.splits["2"].shares)
    rows = torch.zeros(4, 4, dtype=torch.float64)
    rows[0, 0], rows[0, 2] = 1.0, -1.0
    reason = f"weighted by the shares, to sum to 0 over the copies of unit 0 of '2'. Got -?{shares[0].abs():.6g}"
    with pytest.raises(PlanError, match=reason):
        CompatibleEmbedding(split, {"2.weight": rows})
    columns = torch.zeros(4, 4, dtype=torch.float64)
    columns[1, 1], columns[3, 1] = shares[3], -shares[1]
    with pytest.raises(PlanError, match=r"'2\.weight' to sum to 0 over the copies of unit 1 of '0'"):
        CompatibleEmbedding(split, {"2.weight": columns})


def test_shapes_infinities_and_tensors_without_freedom_are_refused() -> None:
    split = split_of([2, 2, 2, 1], {"0": 4, "2": 4})
    with pytest.raises(PlanError, match=r"of the wide shape \(4, 4\). Got shape \(2, 2\)"):
        CompatibleEmbedding(split, {"2.weight": torch.zeros(2, 2)})
    with pytest.raises(PlanError, match="16 of them not finite"):
        CompatibleEmbedding(split, {"2.weight": torch.full((4, 4), torch.inf)})
    with pytest.raises(PlanError, match=r"deviations of '2\.weight'. Got one of '0\.weight': it does not both read"):
        CompatibleEmbedding(split, {"0.weight": torch.zeros(4, 2)})
    with pytest.raises(ShapeError, match="Expected theta with"):
        random_compatible(split, torch.Generator()).apply(torch.zeros(3, dtype=torch.float64))
    with pytest.raises(ShapeError, match="Embed the module that was traced"):
        random_compatible(split, torch.Generator()).state({"2.weight": torch.zeros(9, 2)})
