"""Embedding: the identities of the paper at points that are not critical, and its algorithm, slow and plain."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.embeddings.nets import ACTIVATIONS, data, deep_net, landscape, view_of, worst
from tests.zoo import CASES
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from thalweg.embeddings import Embedding, embed, one_step, reduce, split_plan
from thalweg.errors import PlanError, ShapeError, StructureError
from thalweg.space import Space
from thalweg.structure import trace

seeds = st.integers(0, 10_000)


def split_net(seed: int, hidden: list[int], activation: str, added: list[int], shares: str):
    """A random net of 2 to 5 layers and a plan for all its hidden layers; random shares are of any sign."""
    generator = torch.Generator().manual_seed(seed)
    net = deep_net([2, *hidden, 1 + seed % 3], activation, generator)
    pairs = data(net, generator)
    view = view_of(net, pairs)
    widths = {g.name: g.size + added[i] for i, g in enumerate(view.groups)}
    plan = split_plan(view, widths, shares=shares, generator=generator)
    return net, pairs, Embedding(view, Space.of(net), plan)


@given(
    seeds,
    st.lists(st.integers(1, 4), min_size=1, max_size=4),
    st.sampled_from(sorted(ACTIVATIONS)),
    st.lists(st.integers(0, 3), min_size=4, max_size=4),
    st.sampled_from(["equal", "random"]),
)
def test_outputs_risk_and_gradient_identities_hold_at_any_point(seed, hidden, activation, added, shares) -> None:
    net, pairs, embedding = split_net(seed, hidden, activation, added, shares)
    narrow, wide = landscape(net, pairs), landscape(embedding.wide(net), pairs)
    theta = embedding.apply(narrow.theta())
    torch.testing.assert_close(theta, wide.theta(), rtol=0, atol=0)
    assert worst(wide.outputs(theta), narrow.outputs(narrow.theta())) <= 1e-12
    torch.testing.assert_close(wide.value(theta), narrow.value(narrow.theta()), rtol=1e-12, atol=0)
    predicted = embedding.gradient(narrow.gradient(narrow.theta()))
    assert worst(wide.gradient(theta), predicted) <= 1e-10


@pytest.mark.parametrize("share", [-1.5, 0.0, 0.3, 1.0, 2.5])
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_one_step_equals_the_papers_operator(share: float, activation: str) -> None:
    generator = torch.Generator().manual_seed(5)
    net = deep_net([2, 3, 4, 2], activation, generator)
    pairs = data(net, generator)
    view = view_of(net, pairs)
    for layer, group in enumerate(view.groups):
        for unit in range(group.size):
            embedding = Embedding(view, Space.of(net), one_step(view, group.name, unit, share))
            made = embedding.wide(net)
            expected = papers_one_step(
                [(m.weight, m.bias) for m in net if isinstance(m, nn.Linear)], layer, unit, share
            )
            for (weight, bias), m in zip(expected, [m for m in made if isinstance(m, nn.Linear)], strict=True):
                torch.testing.assert_close(m.weight.detach(), weight, rtol=0, atol=0)
                torch.testing.assert_close(m.bias.detach(), bias, rtol=0, atol=0)


def papers_one_step(
    layers: list[tuple[Tensor, Tensor]], layer: int, unit: int, share: float
) -> list[tuple[Tensor, Tensor]]:
    """Definition 5, entry by entry: a copy of a row below, a share of a column above."""
    result = [(w.detach().clone(), b.detach().clone()) for w, b in layers]
    weight, bias = result[layer]
    result[layer] = torch.cat([weight, weight[unit : unit + 1]]), torch.cat([bias, bias[unit : unit + 1]])
    above, bias_above = result[layer + 1]
    wider = torch.zeros(above.shape[0], above.shape[1] + 1, dtype=above.dtype)
    for row in range(above.shape[0]):
        for column in range(above.shape[1]):
            factor = 1 - share if column == unit else 1.0
            wider[row, column] = factor * above[row, column]
        wider[row, -1] = share * above[row, unit]
    result[layer + 1] = wider, bias_above
    return result


@given(seeds)
def test_a_plan_of_many_steps_equals_its_steps_one_after_the_other(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    net = deep_net([2, 2, 3, 1], "tanh", generator)
    pairs = data(net, generator)
    view, module, total = view_of(net, pairs), net, None
    for _ in range(3):
        current = trace(module, pairs[0])
        group = current.groups[int(torch.randint(2, (), generator=generator))]
        unit = int(torch.randint(group.size, (), generator=generator))
        step = one_step(current, group.name, unit, float(torch.randn((), generator=generator)))
        module = Embedding(current, Space.of(module), step).wide(module)
        total = step if total is None else total.then(step)
    at_once = Embedding(view, Space.of(net), total).apply(Space.of(net).theta(net))
    torch.testing.assert_close(at_once, Space.of(module).theta(module), rtol=1e-14, atol=1e-15)


@given(seeds)
def test_embedding_is_linear_and_injective(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    net = deep_net([2, 3, 2, 1], "gelu", generator)
    view, space = view_of(net, data(net, generator)), Space.of(net)
    plan = split_plan(view, {"0": 5, "2": 4}, shares="random", generator=generator)
    embedding = Embedding(view, space, plan)
    eye = torch.eye(space.num_params, dtype=torch.float64)
    matrix = torch.stack([embedding.apply(e) for e in eye], dim=1)
    theta = torch.randn(space.num_params, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(embedding.apply(theta), matrix @ theta)
    assert int(torch.linalg.matrix_rank(matrix)) == space.num_params


def test_features_copy_and_errors_share() -> None:
    generator = torch.Generator().manual_seed(0)
    net = deep_net([2, 3, 4, 2], "sigmoid", generator)
    x, y = data(net, generator)
    plan = split_plan(view_of(net, (x, y)), {"0": 5, "2": 6}, shares="random", generator=generator)
    wide = Embedding(view_of(net, (x, y)), Space.of(net), plan).wide(net)

    def features_and_errors(module: nn.Sequential) -> tuple[list[Tensor], list[Tensor]]:
        values, hidden = x, []
        for layer in module:
            values = layer(values)
            if isinstance(layer, nn.Sigmoid):
                hidden.append(values)
        return hidden, list(torch.autograd.grad(((values - y) ** 2).mean(), hidden))

    for name, narrow_f, wide_f, narrow_z, wide_z in zip(
        ["0", "2"],
        *(column for pair in zip(*map(features_and_errors, (net, wide)), strict=True) for column in pair),
        strict=True,
    ):
        split = plan.splits[name]
        parents = torch.from_numpy(split.parents)
        torch.testing.assert_close(wide_f, narrow_f[:, parents], rtol=1e-12, atol=0)
        torch.testing.assert_close(
            wide_z, narrow_z[:, parents] * torch.from_numpy(split.shares), rtol=1e-10, atol=1e-15
        )


def loss_of_anything(outputs, _targets) -> Tensor:
    found = [t for t in tree_leaves(outputs) if isinstance(t, Tensor)]
    weights = [torch.linspace(0.3, 1, t.numel(), dtype=t.dtype).reshape(t.shape) for t in found]
    return torch.stack([(torch.sin(t + 0.3) * w).sum() for t, w in zip(found, weights, strict=True)]).sum()


RIGID = {
    # These fix a size in their code: they are refused, and need a wide module of the user's own.
    ("maxout", "pieces/0"), ("padded_shortcut", "conv2/0"), ("padded_shortcut", "conv2/1"),
    ("channel_shuffle", "stem/0"), ("branches", "stem/0"), ("branches", "stem/1"),
    ("encoder", "blocks.0.attention.q/0"), ("encoder", "blocks.1.attention.q/0"), ("vit", "patches"),
    ("vit", "qkv/0"), ("stock_encoder", "embed"), ("stock_encoder", "layer.self_attn/0"), ("elman_cell", "cell"),
    ("hard_coded_view", "first"), ("width_scale", "first"), ("gpt", "qkv/0"), ("gpt", "qkv/2"),
    ("picked_unit", "first/0"),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(CASES))
def test_every_group_of_the_zoo_embeds_exactly_or_is_refused(name: str) -> None:
    module = CASES[name].build().double()
    inputs = tuple(x.double() if x.is_floating_point() else x for x in CASES[name].example())
    view = trace(module, inputs)
    generator = torch.Generator().manual_seed(1)
    for group in view.groups:
        if not group.is_duplicable:
            with pytest.raises(PlanError, match="whose units can be duplicated"):
                split_plan(view, {group.name: group.size + 1})
            continue
        even = group.coupling == "average"
        width, shares = (2 * group.size, "equal") if even else (2 * group.size + 1, "random")
        if (name, group.name) in RIGID:
            with pytest.raises(StructureError, match="Its code fixes a size"):
                embed(module, inputs, {group.name: width}, shares=shares, view=view, generator=generator)
            continue
        made = embed(module, inputs, {group.name: width}, shares=shares, view=view, generator=generator)
        assert made.error <= 1e-12
        from thalweg.objective import Objective

        narrow = Objective(module, loss_of_anything, [(inputs, torch.zeros(1))])
        wide = Objective(made.module, loss_of_anything, [(inputs, torch.zeros(1))])
        predicted = made.embedding.gradient(narrow.gradient(narrow.theta()))
        assert worst(wide.gradient(wide.theta()), predicted) <= 1e-10
        if name != "zero_head":
            back = reduce(made.module, inputs)
            torch.testing.assert_close(Space.of(module).theta(back.module), narrow.theta(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["vgg", "resnet", "densenet", "encoder", "lstm", "squeeze_excite", "group_norm"])
def test_all_groups_at_once(name: str) -> None:
    module = CASES[name].build().double()
    inputs = tuple(x.double() for x in CASES[name].example())
    view = trace(module, inputs)
    widths = {g.name: 2 * g.size for g in view.groups if g.is_duplicable and (name, g.name) not in RIGID}
    made = embed(module, inputs, widths, view=view)
    assert made.error <= 1e-12
    back = reduce(made.module, inputs)
    torch.testing.assert_close(
        Space.of(module).theta(back.module), Space.of(module).theta(module), rtol=1e-12, atol=1e-14
    )
    buffers = dict(back.module.named_buffers())
    for key, buffer in module.named_buffers():
        torch.testing.assert_close(buffers[key], buffer, rtol=1e-12, atol=1e-14)


def test_a_tied_weight_stays_tied_and_a_frozen_parameter_frozen() -> None:
    gpt = CASES["gpt"].build()
    wide = embed(gpt, CASES["gpt"].example(), {"fc1": 20}).module
    assert len(list(wide.parameters())) == len(list(gpt.parameters()))
    frozen = CASES["frozen_parameters"]
    before = {n: p.requires_grad for n, p in frozen.build().named_parameters()}
    made = embed(frozen.build(), frozen.example(), {"first": 9}).module
    assert {n: p.requires_grad for n, p in made.named_parameters()} == before
    assert not all(before.values())


def test_the_wide_modules_layers_say_their_sizes() -> None:
    resnet = CASES["resnet"]
    wide = embed(resnet.build(), resnet.example(), {"0": 8, "4.conv1": 14}).module
    for layer in wide.modules():
        if isinstance(layer, nn.Conv2d):
            assert (layer.out_channels, layer.in_channels // layer.groups) == tuple(layer.weight.shape[:2])
        if isinstance(layer, nn.BatchNorm2d):
            assert layer.num_features == len(layer.weight) == len(layer.running_var)


def test_a_users_own_wide_module_is_filled() -> None:
    class Heads(nn.Module):
        def __init__(self, heads: int) -> None:
            super().__init__()
            self.heads = heads
            self.q, self.k, self.v = (nn.Linear(4, 3 * heads) for _ in range(3))
            self.out = nn.Linear(3 * heads, 2)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (m(x).unflatten(-1, (self.heads, 3)).transpose(1, 2) for m in (self.q, self.k, self.v))
            return self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    net, inputs = Heads(2).double(), torch.randn(3, 5, 4, dtype=torch.float64)
    with pytest.raises(StructureError, match="Its code fixes a size"):
        embed(net, inputs, {"q/0": 5})
    made = embed(net, inputs, {"q/0": 5}, wide=Heads(5).double())
    assert made.error <= 1e-12
    with pytest.raises(StructureError, match=r"to have 'q\.weight' of shape \(15, 4\). Got \(12, 4\)"):
        embed(net, inputs, {"q/0": 5}, wide=Heads(4).double())


def test_a_state_of_other_shapes_is_refused() -> None:
    net = deep_net([2, 3, 1], "tanh", torch.Generator())
    view = trace(net, torch.randn(3, 2))
    embedding = Embedding(view, Space.of(net), split_plan(view, {"0": 4}))
    with pytest.raises(ShapeError, match="Embed the module that was traced"):
        embedding.state({"0.weight": torch.zeros(9, 2)})


def test_null_units_keep_the_function_and_criticality_of_tanh() -> None:
    generator = torch.Generator().manual_seed(0)
    net = deep_net([2, 3, 1], "tanh", generator)
    pairs = data(net, generator)
    view = view_of(net, pairs)
    plan = split_plan(view, {"0": 5}, parents={"0": [0, 1, 2, -1, -1]})
    embedding = Embedding(view, Space.of(net), plan)
    wide, narrow = landscape(embedding.wide(net), pairs), landscape(net, pairs)
    assert worst(wide.outputs(wide.theta()), narrow.outputs(narrow.theta())) <= 1e-12
    predicted = embedding.gradient(narrow.gradient(narrow.theta()))
    assert worst(wide.gradient(wide.theta()), predicted) <= 1e-10
    back = reduce(embedding.wide(net), pairs[0])
    torch.testing.assert_close(Space.of(net).theta(back.module), narrow.theta(), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_wide_module_keeps_dtype_mode_and_the_narrow_one_is_untouched(dtype: torch.dtype) -> None:
    net = CASES["vgg"].build().to(dtype).train()
    before = {n: t.clone() for n, t in net.state_dict().items()}
    made = embed(net, tuple(x.to(dtype) for x in CASES["vgg"].example()), {"0": 10}).module
    assert made.training
    assert net.training
    assert {t.dtype for t in made.parameters()} == {dtype}
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)
    assert all(p.requires_grad for p in made.parameters())
