import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import prune
from torch.testing import assert_close

from thalweg.errors import StructureError
from thalweg.objective import Objective
from thalweg.precision import copied, placed
from thalweg.structure.trace import prepared

to_double: dict[str, Any] = {"device": "cpu", "dtype": torch.float64}


class Rotary(nn.Module):
    """Rotates pairs of inputs by a complex buffer; one complex parameter is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.read = nn.Linear(4, 1)
        self.turn = nn.Buffer(torch.polar(torch.ones(2), torch.tensor([0.5, 2.0])))
        self.phase = nn.Parameter(torch.tensor([1j, 2j]), requires_grad=False)
        self.count = nn.Buffer(torch.tensor([3]))

    def forward(self, x: Tensor) -> Tensor:
        turned = torch.view_as_complex(x.reshape(-1, 2, 2)) * self.turn * self.phase
        return self.read(torch.view_as_real(turned).flatten(1))


def test_each_tensor_takes_the_type_of_its_kind() -> None:
    twin = copied(Rotary(), **to_double)
    types = {name: tensor.dtype for name, tensor in twin.state_dict().items()}
    assert types == {
        "phase": torch.complex128,
        "read.weight": torch.float64,
        "read.bias": torch.float64,
        "turn": torch.complex128,
        "count": torch.int64,
    }


def test_without_a_type_every_tensor_keeps_its_own() -> None:
    net = Rotary()
    net.read.double()
    twin = copied(net, device="cpu")
    assert {n: t.dtype for n, t in twin.state_dict().items()} == {n: t.dtype for n, t in net.state_dict().items()}


def test_the_original_is_left_alone_and_the_copy_shares_nothing() -> None:
    net = Rotary()
    net.read.weight.grad = torch.ones(1, 4)
    twin = copied(net, device="cpu", dtype=torch.float32)
    with torch.no_grad():
        twin.read.weight.zero_()
    assert bool(net.read.weight.any())
    assert net.read.weight.grad is not None
    assert twin.read.weight.grad is None


def test_ties_are_kept() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    net[1].weight = net[0].weight
    twin = copied(net, **to_double)
    assert twin[1].weight is twin[0].weight


def pruned() -> nn.Module:
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))
    prune.random_unstructured(net[0], "weight", amount=0.5)
    return net


def normed() -> nn.Module:
    net = nn.Linear(4, 1)
    with pytest.warns(FutureWarning, match="deprecated"):
        return nn.utils.weight_norm(net)


class Remembering(nn.Module):
    """Keeps what it computed last, in a dict: a graph hangs on an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(4, 1)
        self.seen: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        self.seen = {"output": self.line(x)}
        return self.seen["output"]


@pytest.mark.parametrize("build", [pruned, normed, Remembering])
def test_a_module_that_keeps_computed_tensors_is_copied(build: Any) -> None:
    net = build()
    x = torch.ones(2, 4)
    expected = net(x)
    found = copied(net, **to_double)(x.double())
    assert_close(found, expected.double(), rtol=1e-6, atol=1e-6)
    assert_close(prepared(net, (x,))[0](x.double()), found, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")
def test_a_gradient_with_a_graph_is_no_obstacle() -> None:
    net = nn.Linear(2, 1)
    net(torch.ones(1, 2)).pow(2).sum().backward(create_graph=True, inputs=[net.weight])
    assert copied(net, **to_double).weight.grad is None
    net.weight.grad = None


def test_a_complex_trainable_parameter_is_refused() -> None:
    net = Rotary()
    net.phase.requires_grad_(True)
    match = r"Expected real trainable parameters. Got 'phase' of type torch.complex64"
    with pytest.raises(StructureError, match=match):
        copied(net, **to_double)
    with pytest.raises(StructureError, match=match):
        prepared(net, (torch.ones(2, 4),))


def test_a_module_that_cannot_be_copied_is_refused_in_one_line() -> None:
    net = nn.Linear(2, 1)
    net.lock = threading.Lock()
    with pytest.raises(StructureError, match=r"Expected a module that can be copied. Got TypeError: .*lock") as found:
        copied(net, **to_double)
    assert "\n" not in str(found.value)
    with pytest.raises(StructureError, match="can be copied"):
        prepared(net, (torch.ones(1, 2),))


def test_a_module_with_a_complex_buffer_is_prepared_in_double_precision() -> None:
    net, x = Rotary(), torch.ones(2, 4)
    twin, inputs = prepared(net, (x,))
    assert_close(twin(*inputs), net(x).double(), rtol=1e-6, atol=1e-6)


def test_data_of_every_kind_are_placed() -> None:
    data = {"x": [torch.ones(1), torch.ones(1, dtype=torch.complex64)], "labels": torch.tensor([1]), "name": "a"}
    found = placed(data, **to_double)
    assert [t.dtype for t in found["x"]] == [torch.float64, torch.complex128]
    assert found["labels"] is data["labels"]
    assert found["name"] == "a"


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


TARGETS = torch.zeros(7, 1, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_complex_buffers_of_a_landscape_stay_complex(dtype: torch.dtype | None) -> None:
    net, inputs = Rotary(), randn(7, 4)
    objective = Objective(net, nn.MSELoss(), (inputs, TARGETS), dtype=dtype)
    expected = functional.mse_loss(net(inputs.float()), TARGETS.float()).detach()
    assert_close(objective.value(objective.theta()).float(), expected)


def test_complex_inputs_take_the_precision_of_the_landscape() -> None:
    class Real(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.line = nn.Linear(2, 1)

        def forward(self, z: Tensor) -> Tensor:
            return self.line(z.real)

    objective = Objective(Real(), nn.MSELoss(), (torch.complex(randn(7, 2), randn(7, 2)), TARGETS))
    objective.value(objective.theta())
    assert objective.outputs(objective.theta()).dtype == torch.float32


def test_a_landscape_refuses_a_complex_trainable_parameter() -> None:
    net = Rotary()
    net.phase.requires_grad_(True)
    with pytest.raises(StructureError, match=r"Expected real trainable parameters\. Got 'phase'"):
        Objective(net, nn.MSELoss(), (randn(7, 4), TARGETS))
