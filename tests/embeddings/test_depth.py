"""Lifts in depth: outputs, gradients and critical points on the data; how a smooth activation approaches."""

import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.embeddings.nets import ACTIVATIONS, data, deep_net, landscape, worst
from tests.embeddings.test_splitting import loss_of_anything
from tests.zoo import CASES, randomize_
from torch import Tensor, nn
from torch.nn.utils import prune

from thalweg.data import three_tanh
from thalweg.embeddings import Deepened, deepen
from thalweg.errors import ConfigError, NumericalError, ShapeError, StructureError
from thalweg.objective import Objective
from thalweg.probes import inertia, spectrum
from thalweg.space import Space
from thalweg.training import polish

EXACT = ["relu", "leaky_relu", "elu", "gelu", "silu", "softplus"]
seeds = st.integers(0, 10_000)


def require_identities(made: Deepened, inputs: tuple[Tensor, ...]) -> None:
    """Outputs to 1e-12 and gradients to 1e-10, at a point that is not critical."""
    narrow = Objective(made.reference, loss_of_anything, [(inputs, torch.zeros(1))])
    deep = Objective(made.module, loss_of_anything, [(inputs, torch.zeros(1))])
    assert made.is_exact
    assert made.error <= 1e-12
    torch.testing.assert_close(deep.value(deep.theta()), narrow.value(narrow.theta()), rtol=1e-12, atol=1e-12)
    predicted = made.gradient(narrow.gradient(narrow.theta()))
    assert worst(deep.gradient(deep.theta()), predicted) <= 1e-10


@settings(max_examples=20)
@given(
    seeds,
    st.lists(st.integers(1, 4), min_size=1, max_size=3),
    st.sampled_from(sorted(ACTIVATIONS)),
    st.sampled_from(EXACT),
    st.integers(0, 3),
)
def test_an_affine_activation_lifts_any_layer_exactly(seed, hidden, inner, activation, position) -> None:
    generator = torch.Generator().manual_seed(seed)
    net = deep_net([2, *hidden, 1 + seed % 3], inner, generator)
    x, _ = data(net, generator)
    made = deepen(net, x, str(2 * (position % (len(hidden) + 1))), activation=activation)
    require_identities(made, (x,))


CONVOLUTIONS = {
    "padded": nn.Conv2d(4, 3, 3, padding=1),
    "same": nn.Conv2d(4, 3, 3, padding="same", dilation=2),
    "strided": nn.Conv2d(4, 3, 3, stride=2, padding=(2, 1)),
    "grouped": nn.Conv2d(4, 6, 3, groups=2, padding=1),
    "depthwise": nn.Conv2d(4, 8, 2, groups=4),
    "circular": nn.Conv2d(4, 3, 3, padding=1, padding_mode="circular"),
    "no bias": nn.Conv2d(4, 3, 3, padding=1, bias=False),
}


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("name", sorted(CONVOLUTIONS))
def test_a_convolution_is_lifted_with_its_padding_strides_and_groups(name: str, activation: str) -> None:
    layer = CONVOLUTIONS[name]
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), layer, nn.Tanh(), nn.Flatten(), nn.LazyLinear(2)).double()
    x = torch.randn(3, 2, 7, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    net(x)
    made = deepen(randomize_(net, 1).double(), x, "2", activation=activation)
    require_identities(made, (x,))
    new, _, old = made.module[2]
    assert (new.kernel_size, new.groups, old.stride) == ((1, 1), layer.groups, layer.stride)
    assert made.added_bias == (name == "no bias")


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv3d])
def test_convolutions_of_other_dimensions_are_lifted(kind: type[nn.Module]) -> None:
    dims = 1 if kind is nn.Conv1d else 3
    net = nn.Sequential(kind(2, 3, 3, padding=1), nn.Tanh(), kind(3, 2, 2, padding=1), nn.Flatten()).double()
    x = torch.randn(2, 2, *[4] * dims, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    require_identities(deepen(net, x, "2"), (x,))


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("resnet", "4.conv2"), ("resnet", "4.shortcut.0"), ("resnet", "3.conv1"), ("vgg", "9"), ("lenet", "7"),
        ("grouped_conv", "2"), ("squeeze_excite", "excite"), ("unet", "down2"), ("shared_layer", "shared"),
        ("gated_mlp", "down"), ("encoder", "blocks.0.attention.out"), ("frozen_parameters", "second"),
    ],
)  # fmt: skip
def test_layers_of_real_networks_are_lifted(name: str, layer: str) -> None:
    module = CASES[name].build().double()
    inputs = tuple(x.double() if x.is_floating_point() else x for x in CASES[name].example())
    before = {n: t.clone() for n, t in module.state_dict().items()}
    made = deepen(module, inputs, layer)
    require_identities(made, inputs)
    for key, tensor in module.state_dict().items():
        torch.testing.assert_close(tensor, before[key], rtol=0, atol=0)


def test_a_users_own_module_called_by_keyword() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, *, x: Tensor, z: Tensor) -> dict[str, Tensor]:
            return {"out": self.second(input=torch.sin(self.first(x))) + z}

    net = Own().double().train()
    batch = {"x": torch.randn(5, 3, dtype=torch.float64), "z": torch.randn(5, 2, dtype=torch.float64)}
    made = deepen(net, batch, "first")
    assert made.error <= 1e-12
    assert made.module.training
    assert made.module.first[0].weight.shape == (3, 3)


@functools.cache
def critical_net(*, output_bias: bool, width: int) -> tuple[nn.Sequential, Objective]:
    """The paper's 1-D data at a polished critical point of width 1 or 2."""
    start = {1: [0.0895366, 0.0, 3.746951], 2: [1.302005, 0.154989, -9.335645, 0.417625, 0.788588, 2.341854]}[width]
    net = nn.Sequential(nn.Linear(1, width), nn.Tanh(), nn.Linear(width, 1, bias=output_bias)).double()
    samples = three_tanh()
    objective = Objective(
        net, lambda o, t: ((o - t) ** 2).mean(), (samples.inputs.double(), samples.targets.double())
    )
    point = polish(objective, torch.tensor([*start, *[0.0] * output_bias], dtype=torch.float64))
    assert point.gradient_l1 <= 1e-12
    objective.space.write(point.theta, net)
    return net, objective


def lifted(made: Deepened, objective: Objective) -> Objective:
    samples = three_tanh()
    return Objective(made.module, objective.loss, (samples.inputs.double(), samples.targets.double()))


@pytest.mark.parametrize("activation", EXACT)
@pytest.mark.parametrize("layer", ["0", "2"])
def test_a_critical_point_stays_critical(layer: str, activation: str) -> None:
    net, objective = critical_net(output_bias=True, width=2)
    made = deepen(net, three_tanh().inputs.double(), layer, activation=activation)
    deep = lifted(made, objective)
    assert made.is_exact
    assert float(deep.gradient(deep.theta()).abs().sum()) <= 1e-10


@pytest.mark.parametrize(("width", "layer"), [(1, "2"), (2, "0"), (2, "2")])
def test_no_eigenvalue_count_falls_at_a_lifted_critical_point(width: int, layer: str) -> None:
    net, objective = critical_net(output_bias=True, width=width)
    deep = lifted(deepen(net, three_tanh().inputs.double(), layer), objective)
    narrow = Objective(net, objective.loss, (three_tanh().inputs.double(), three_tanh().targets.double()))
    before, after = (inertia(spectrum(o, o.theta()), 1e-11) for o in (narrow, deep))
    assert (before.negative, before.zero) == (0, 0)
    assert after.positive >= before.positive
    assert after.zero > 0  # W' V may trade: the lifted point lies on a manifold of critical points


def test_without_a_bias_a_point_stays_critical_only_if_its_errors_sum_to_zero() -> None:
    inputs = three_tanh().inputs.double()
    sums = {}
    for width in (1, 2):
        net, objective = critical_net(output_bias=False, width=width)
        made = deepen(net, inputs, "2")
        assert made.added_bias
        assert made.error <= 1e-12
        deep, before = (
            lifted(made, objective),
            Objective(made.reference, objective.loss, (inputs, three_tanh().targets)),
        )
        slope = before.gradient(before.theta())
        predicted = made.gradient(slope)
        torch.testing.assert_close(deep.gradient(deep.theta()), predicted, rtol=1e-10, atol=1e-11)
        sums[width] = float(slope.abs().sum()), float(deep.gradient(deep.theta()).abs().sum())
    assert max(sums[1]) <= 1e-10  # odd data, odd output: the errors cancel
    assert min(sums[2]) > 1e-3


def test_a_layer_without_bias_stays_so_on_positive_inputs() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.Sigmoid(), nn.Linear(3, 2, bias=False)).double()
    x = torch.randn(7, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for activation in ("relu", "leaky_relu", "elu"):
        made = deepen(net, x, "2", activation=activation)
        assert not made.added_bias
        assert made.module[2][0].bias is None
        require_identities(made, (x,))
    assert deepen(net, x, "2", activation="gelu").added_bias


@pytest.mark.parametrize(
    ("activation", "centre", "order"),
    [("tanh", None, 2), ("sigmoid", None, 2), ("gelu", math.sqrt(2), 2), ("silu", 2.399357280520054, 2),
     ("softplus", 0.0, 1), ("gelu", 0.5, 1), ("tanh", 0.5, 1)],
)  # fmt: skip
def test_the_error_of_a_smooth_lift_falls_with_the_order_of_its_centre(activation, centre, order) -> None:
    generator = torch.Generator().manual_seed(2)
    net = deep_net([2, 4, 3, 2], "tanh", generator)
    x, _ = data(net, generator)
    made = [deepen(net, x, "2", activation=activation, centre=centre, tolerance=t) for t in (1e-2, 1e-4, 1e-6)]
    assert all(m.error <= t for m, t in zip(made, (1e-2, 1e-4, 1e-6), strict=True))
    errors = [math.log(m.error) for m in made]
    scales = [math.log(m.expansion.epsilon) for m in made]
    slope = (errors[-1] - errors[-2]) / (scales[-1] - scales[-2])
    assert abs(slope - order) <= 0.05


def test_the_gradient_of_a_smooth_lift_approaches_the_prediction() -> None:
    generator = torch.Generator().manual_seed(3)
    net = deep_net([2, 4, 3, 2], "sigmoid", generator)
    pairs = data(net, generator)
    before = landscape(net, pairs)
    errors = []
    for tolerance in (1e-3, 1e-5, 1e-7):
        made = deepen(net, pairs[0], "2", activation="tanh", tolerance=tolerance)
        deep = landscape(made.module, pairs)
        errors.append(worst(deep.gradient(deep.theta()), made.gradient(before.gradient(before.theta()))))
    assert errors[2] <= 1e-5
    assert errors[2] < errors[1] < errors[0]


@pytest.mark.parametrize(("centre", "order"), [(0.0, 1), (0.5, 0)])
def test_a_smooth_lift_of_a_critical_point_is_critical_to_the_order_of_its_centre(centre: float, order: int) -> None:
    net, objective = critical_net(output_bias=True, width=2)
    made = [
        deepen(net, three_tanh().inputs.double(), "2", activation="tanh", centre=centre, tolerance=t)
        for t in (1e-4, 1e-6)
    ]
    slopes = [float(d.gradient(d.theta()).abs().sum()) for d in (lifted(m, objective) for m in made)]
    ratio = made[1].expansion.epsilon / made[0].expansion.epsilon
    assert abs(math.log(slopes[1] / slopes[0]) / math.log(ratio) - order) <= 0.05


def test_a_user_may_bring_an_activation() -> None:
    generator = torch.Generator().manual_seed(4)
    net = deep_net([2, 3, 2], "tanh", generator)
    x, _ = data(net, generator)
    require_identities(deepen(net, x, "2", activation=nn.PReLU(3)), (x,))
    require_identities(deepen(net, x, "2", activation=nn.SELU()), (x,))
    require_identities(deepen(net, x, "2", activation=nn.Hardtanh()), (x,))
    require_identities(deepen(net, x, "2", activation=nn.ReLU6(), centre=3.0), (x,))
    with pytest.raises(ConfigError, match=r"slope at 0\.0\. Got slope 0 of ReLU6"):
        deepen(net, x, "2", activation=nn.ReLU6(), margin=10.0)


def test_a_layer_may_be_the_whole_module_or_be_used_twice_and_a_frozen_one_stays_frozen() -> None:
    x = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    require_identities(deepen(nn.Linear(3, 2).double(), x, ""), (x,))
    layer = nn.Linear(3, 3)
    require_identities(deepen(nn.Sequential(layer, nn.Tanh(), layer).double(), x, "2"), (x,))
    frozen = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    frozen[2].requires_grad_(False)
    made = deepen(frozen, x, "2")
    assert Space.of(made.module) == Space.of(frozen)
    require_identities(made, (x,))


def test_single_precision_modules_stay_so() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2))
    x = torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
    for activation in ("relu", "gelu", "tanh"):
        made = deepen(net, x, "2", activation=activation)
        assert made.error <= 4e-4
        assert {p.dtype for p in made.module.parameters()} == {torch.float32}
    draws = torch.get_rng_state()
    deepen(net, x, "2")
    torch.testing.assert_close(torch.get_rng_state(), draws)


class Gain(nn.Module):
    """ReLU times a trainable number."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * torch.relu(x)


class Reader(nn.Module):
    """Its forward asks a layer for its size; another layer it never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.idle = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * self.layer.in_features


class Answer(nn.Module):
    """It gives classes, not numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).argmax(1)


def tied() -> nn.Module:
    net = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2))
    net[2].weight = net[0].weight
    return net


def half_frozen() -> nn.Module:
    net = nn.Sequential(nn.Linear(2, 2))
    net[0].bias.requires_grad_(False)
    return net


def pruned() -> nn.Module:
    net = nn.Sequential(nn.Linear(2, 2))
    prune.random_unstructured(net[0], "weight", 1)
    return net


X = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("make", "layer", "options", "error", "message"),
    [
        (lambda: nn.Sequential(nn.Linear(2, 2)), "head", {}, StructureError, "a layer among '0'. Got 'head'"),
        (lambda: nn.Sequential(nn.Linear(2, 2), nn.Tanh()), "1", {}, StructureError, "Got Tanh"),
        (
            lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))),
            "0", {}, StructureError, "remove its parametrisation",
        ),
        (pruned, "0", {}, StructureError, "Got one made of other tensors"),
        (tied, "2", {}, StructureError, "whose weight is '0.weight' too"),
        (half_frozen, "0", {}, StructureError, "both trainable or both frozen"),
        (Reader, "idle", {}, StructureError, "Got no call"),
        (Answer, "layer", {}, StructureError, "Expected outputs of real numbers to compare. Got none"),
        (Reader, "layer", {}, StructureError, "Its code reads the layer's attributes"),
        (lambda: nn.Linear(2, 2), "", {"activation": Gain()}, StructureError, "trainable parameters do nothing"),
        (lambda: nn.Linear(2, 2), "", {"activation": "swash"}, ConfigError, "an activation among relu"),
        (lambda: nn.Linear(2, 2), "", {"activation": "relu", "centre": -1.0}, ConfigError, "slope 0 of ReLU"),
        (lambda: nn.Linear(2, 2), "", {"tolerance": 0.0}, ConfigError, "positive tolerance and margin"),
        (lambda: nn.Linear(2, 2), "", {"margin": -1.0}, ConfigError, "positive tolerance and margin"),
        (
            lambda: nn.Linear(2, 2), "", {"activation": "sigmoid", "tolerance": 1e-9}, NumericalError,
            r"at best, with ε = .*truncation falls with ε, rounding rises",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_deepened_is_refused(make, layer, options, error, message) -> None:
    with pytest.raises(error, match=message):
        deepen(make(), X, layer, **options)


def test_padding_that_differs_between_sides_inputs_that_are_not_finite_and_foreign_gradients_are_refused() -> None:
    images = torch.ones(1, 2, 4, 4)
    assert deepen(nn.Conv2d(2, 2, 2, padding="valid"), images, "").error <= 1e-5
    # PyTorch warns of such a layer when it runs; it is refused before.
    with pytest.raises(StructureError, match="padded alike on both sides"):
        deepen(nn.Conv2d(2, 2, 2, padding="same"), images, "")
    with pytest.raises(NumericalError, match="Expected finite inputs"):
        deepen(nn.Linear(2, 2), torch.full((3, 2), torch.nan), "")
    with pytest.raises(ShapeError, match="with 6 parameters"):
        deepen(nn.Linear(2, 2), X, "").gradient(torch.zeros(7))
