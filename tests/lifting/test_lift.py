"""lift: the same outputs from any convolutional network; what is refused, what is kept, and what is said of it."""

import copy
import re
import sys
import time
from inspect import unwrap

import pytest
import torch
from tests.lifting.nets import Asymmetric, normed, random_cnn
from tests.zoo import CASES
from torch import Tensor, nn

from thalweg.errors import ConfigError, MemoryLimitError, StructureError
from thalweg.lifting import LocallyConnected, lift, lift_plan
from thalweg.lifting.lift import require_memory
from thalweg.nets import vanilla_cnn
from thalweg.structure.comparison import output_change


def _images(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=dtype)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("seed", range(20))
def test_a_random_cnn_computes_the_same_in_every_form(seed: int) -> None:
    net, inputs = random_cnn(seed)
    for to, padded in (("fc", False), ("fc", True), ("local", False)):
        assert lift(net, inputs, to=to, padded=padded).error <= 1e-12
    if seed % 4:
        return
    mixed = lift(net, inputs, to={"0": "local", "3.branch.0": "fc"})
    assert mixed.error <= 1e-12
    assert isinstance(mixed.module.get_submodule("3.branch.2"), type(net.get_submodule("3.branch.2")))
    single = lift(net.float(), inputs.float(), to=("fc", "local")[seed % 2])
    assert single.error <= 1e-5


def test_other_images_give_the_same_too() -> None:
    net, inputs, _ = normed()
    other = _images(4, 2, 8, 8, dtype=torch.float64)
    assert output_change(lift(net, inputs).module, net, other) <= 1e-12
    assert not torch.equal(other, inputs[:4])


@pytest.mark.parametrize("to", ["fc", "local"])
def test_one_sided_padding_by_code_stays(to: str) -> None:
    assert lift(Asymmetric(2).double(), _images(2, 2, 5, 6), to=to).error <= 1e-12


def test_a_sample_without_a_batch_is_taken() -> None:
    net = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU()).double()
    for to in ("fc", "local"):
        assert lift(net, _images(2, 4, 4), to=to).error <= 1e-12


_CONVOLUTIONAL = (
    *("vgg", "lenet", "conv1d", "resnet", "padded_shortcut", "densenet", "depthwise", "depthwise_multiplier"),
    *("grouped_conv", "group_norm", "instance_norm", "squeeze_excite", "channel_shuffle", "branches", "unet"),
    *("pixel_shuffle", "autoencoder", "vit"),
)


@pytest.mark.parametrize("name", _CONVOLUTIONAL)
def test_the_zoo_lifts(name: str) -> None:
    module, inputs = CASES[name].build().double(), CASES[name].example()
    for to in ("fc", "local"):
        lifted = lift(module, inputs, to=to)
        assert lifted.error <= 1e-12
        transposed = {n for n, m in module.named_modules() if isinstance(m, nn.ConvTranspose2d)}
        assert set(lifted.plan.kept) == transposed
        assert all("ConvTranspose2d is no nn.Conv1d" in reason for reason in lifted.plan.kept.values())


def test_the_papers_network_has_the_papers_sizes() -> None:
    net = vanilla_cnn()
    head, whole = 650, sum(p.numel() for p in net.parameters())
    counts = {
        padded: head + sum(x.num_params for x in lift_plan(net, torch.zeros(1, 3, 32, 32), padded=padded).layers)
        for padded in (True, False)
    }
    assert (whole, counts) == (143_178, {True: 110_606_602, False: 73_952_522})


def test_the_papers_network_computes_the_same() -> None:
    lifted = lift(vanilla_cnn(), _images(2, 3, 32, 32))
    assert sum(p.numel() for p in lifted.module.parameters()) == 73_952_522
    assert lifted.error <= 1e-5


def test_the_module_is_not_touched_and_modes_stay() -> None:
    net, inputs, _ = normed()
    net[3].eval()
    before = copy.deepcopy(net.state_dict())
    lifted = lift(net, inputs)
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
    assert net.training
    assert lifted.module.training
    assert lifted.module[0].linear.training
    assert not lifted.module[3].branch[0].linear.training


def test_frozen_weights_stay_frozen() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 2))
    net[0].weight.requires_grad_(False)
    for to in ("fc", "local"):
        module = lift(net, _images(1, 1, 5, 5), to=to).module
        frozen = [name for name, p in module.named_parameters() if not p.requires_grad]
        assert frozen == ["0.linear.weight" if to == "fc" else "0.weight"]


def test_a_convolution_that_is_the_whole_module_lifts() -> None:
    net = nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect").double()
    for to in ("fc", "local"):
        lifted = lift(net, _images(2, 2, 5, 4), to=to)
        assert lifted.error <= 1e-12
        theta = lifted.lifting.space.theta(net)
        torch.testing.assert_close(lifted.lifting.lifted_space.theta(lifted.module), lifted.lifting.apply(theta))


class _Twice(nn.Module):
    """One convolution under two names, or called more than once."""

    def __init__(self, second_padding: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 2, 3, padding=1)
        self.again = self.first
        self.pool = nn.AvgPool2d(1 + second_padding)

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.pool(self.first(x)))


def test_a_convolution_registered_twice_is_lifted_once() -> None:
    for to in ("fc", "local"):
        lifted = lift(_Twice(0).double(), _images(2, 2, 4, 4), to=to)
        assert lifted.error <= 1e-12
        assert lifted.module.first is lifted.module.again
        assert lifted.plan.layers[0].names == ("first", "again")


class _Functional(nn.Module):
    """Applies a weight by a function; and another convolution's weight besides."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 2, 3, 3))
        self.conv = nn.Conv2d(2, 2, 3)
        self.borrowed = nn.Conv2d(2, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.conv2d(self.borrowed(x), self.borrowed.weight)
        return self.conv(nn.functional.conv2d(x, self.weight))


class _Keyword(nn.Module):
    """Calls a convolution by keyword, which what replaces it would not understand."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(input=x))


class _Own(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class _Unreached(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.idle = nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


def _tied(kind: str) -> nn.Module:
    net = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 1))
    setattr(net[1], kind, getattr(net[0], kind))
    return net


def _hooked() -> nn.Module:
    net = nn.Sequential(nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 1))
    net[0].register_forward_hook(lambda _, __, outputs: outputs + 1)
    return net


def _normalised() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 2, 3)), nn.Conv2d(2, 2, 1))


@pytest.mark.parametrize(
    ("net", "kept"),
    [
        (nn.Sequential(nn.ConvTranspose2d(2, 2, 2), nn.Conv2d(2, 2, 1)), {"0": "is no nn.Conv1d"}),
        (nn.Sequential(_Own(2, 2, 3), nn.Conv2d(2, 2, 1)), {"0": "_Own computes something else than Conv2d"}),
        (_normalised(), {"0": "remove the parametrization"}),
        (_Unreached(), {"idle": "does not reach it"}),
        (_tied("weight"), {"0": "shares its weight with '1'", "1": "shares its weight with '0'"}),
        (_tied("bias"), {"0": "shares its bias with '1'", "1": "shares its bias with '0'"}),
        (_hooked(), {"0": "hooks"}),
        (_Keyword(), {"first": "as a keyword"}),
        (_Functional(), {"weight": "called as a function", "borrowed": "used by code"}),
    ],
    ids=(
        "transposed",
        "subclass",
        "weight_norm",
        "unreached",
        "tied_weight",
        "tied_bias",
        "hooked",
        "keyword",
        "functional",
    ),
)
def test_what_cannot_be_lifted_is_kept_and_says_why(net: nn.Module, kept: dict[str, str]) -> None:
    lifted = lift(net.double(), _images(2, 2, 6, 6))
    assert lifted.error <= 1e-12
    assert set(lifted.plan.kept) == set(kept)
    assert all(kept[name] in reason for name, reason in lifted.plan.kept.items())


def test_a_convolution_applied_at_two_sizes_is_kept() -> None:
    with pytest.raises(StructureError, match=r"Got none \(first: it is applied to inputs of several sizes: \(4, 4\)"):
        lift(_Twice(1), _images(2, 2, 4, 4))


def test_a_lazy_convolution_that_never_ran_is_refused() -> None:
    with pytest.raises(StructureError, match="uninitialized parameter"):
        lift(nn.Sequential(nn.LazyConv2d(2, 3)), _images(2, 2, 4, 4))


@pytest.mark.parametrize(
    ("to", "error", "message"),
    [
        ("dense", ConfigError, "Expected a kind of fc, local, shared. Got 'dense'"),
        ({"0": "dense"}, ConfigError, "Got 'dense'"),
        ({"7": "fc"}, StructureError, "Expected the name of a convolution. Got '7'. There are: 0, 1"),
        ({"1": "fc"}, StructureError, "Expected '1' to be a convolution that can be lifted"),
    ],
    ids=str,
)
def test_what_is_asked_for_must_be_there(to: object, error: type, message: str) -> None:
    net = nn.Sequential(nn.Conv2d(2, 2, 3), nn.ConvTranspose2d(2, 2, 1))
    with pytest.raises(error, match=re.escape(message)):
        unwrap(lift_plan)(net, _images(1, 2, 4, 4), to=to)


def test_a_network_without_convolutions_is_refused() -> None:
    with pytest.raises(StructureError, match=r"Expected a convolution that can be lifted. Got none"):
        lift(nn.Linear(4, 2), torch.zeros(1, 4))


def test_an_example_that_does_not_fit_is_refused() -> None:
    with pytest.raises(StructureError, match="Expected the module to run on the example"):
        lift(nn.Conv2d(2, 2, 3), torch.zeros(1, 1, 4, 4))


class _Looks(nn.Module):
    """Its code looks into its convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) / self.conv.stride[0]


def test_code_that_looks_into_a_layer_is_refused() -> None:
    with pytest.raises(StructureError, match=r"Expected the lifted module to run. Got AttributeError"):
        lift(_Looks(), _images(1, 2, 4, 4))


class _Counts(nn.Module):
    """Computes something else where it has more parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) * sum(p.numel() for p in self.parameters())


def test_a_network_that_computes_something_else_afterwards_is_refused() -> None:
    with pytest.raises(StructureError, match="Expected the lifted module to compute the same outputs"):
        lift(_Counts(), _images(1, 2, 4, 4))


def test_shared_is_the_network_itself() -> None:
    net = nn.Sequential(nn.Conv2d(2, 2, 3), nn.ReLU()).double()
    lifted = lift(net, _images(1, 2, 4, 4), to="shared")
    theta = lifted.lifting.space.theta(net)
    assert lifted.error == 0
    assert torch.equal(lifted.lifting.apply(theta), theta)
    assert not lifted.plan.layers


def test_patterns_choose_by_name() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 2), nn.Conv2d(2, 2, 1))
    module = lift(net, _images(1, 1, 6, 6), to={"0": "local", "2": "shared", "*": "fc"}).module
    assert isinstance(module[0], LocallyConnected)
    assert isinstance(module[1].linear, nn.Linear)
    assert isinstance(module[2], nn.Conv2d)


def test_a_lift_over_the_limit_names_the_layer_and_the_bytes() -> None:
    net = nn.Sequential(nn.Conv2d(1, 1, 3), nn.Conv2d(1, 4, 2))
    plan = lift_plan(net, _images(1, 1, 6, 6))
    assert plan.num_bytes == 4 * sum(layer.num_params for layer in plan.layers)
    with pytest.raises(MemoryLimitError, match="of lifted weights") as caught:
        lift(net, _images(1, 1, 6, 6), max_memory=1000)
    largest = max(plan.layers, key=lambda layer: layer.num_bytes)
    for part in (
        f"{plan.num_bytes:,} bytes",
        f"{largest.name!r}, {largest.num_params:,} parameters",
        "1,000 bytes (1.0 kB)",
    ):
        assert part in str(caught.value)
    require_memory(plan, plan.num_bytes)
    require_memory(plan, None)


def test_terabytes_are_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def grown(*_: object, **__: object) -> None:
        raise AssertionError("allocated")

    monkeypatch.setattr(sys.modules["thalweg.lifting.lift"], "build_lifted", grown)
    monkeypatch.setattr(sys.modules["thalweg.lifting.lifting"], "spread", grown)
    net, begun = nn.Sequential(nn.Conv2d(3, 1, 3, stride=2, padding=1)), time.process_time()
    with pytest.raises(MemoryLimitError, match=r"\(844\.4 TB\)"):
        lift(net, torch.zeros(1, 3, 4096, 4096))
    assert time.process_time() - begun < 5
