"""Chains: which networks are read, and that a trace is the network's own forward pass."""

import pytest
import torch
from torch import nn

from thalweg.errors import ShapeError, StructureError
from thalweg.nets import relu_cnn, relu_mlp
from thalweg.teacher_student import chain
from thalweg.teacher_student.chain import require_pair


def nets(norm: str) -> list[tuple[nn.Sequential, torch.Tensor]]:
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(1)
        found = [
            (relu_mlp((4, 5), num_inputs=3, num_outputs=2, norm=norm, affine=True), torch.randn(6, 3)),
            (relu_cnn((2, 3), image_size=7, num_outputs=2, norm=norm), torch.randn(6, 1, 7, 7)),
        ]
        for net, _ in found:
            for layer in net:
                if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
                    layer.weight.data.uniform_(0.5, 2.0)
                    layer.running_mean.normal_()
                    layer.running_var.uniform_(0.5, 2.0)
    return found


@pytest.mark.parametrize("norm", ["none", "after_relu", "before_relu"])
def test_a_trace_is_the_forward_pass_in_both_modes_and_changes_nothing(norm: str) -> None:
    for net, x in nets(norm):
        before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
        evaluated, trained = (chain(net).trace(x, batch_statistics=is_batch) for is_batch in (False, True))
        assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
        for trace, mode in ((evaluated, False), (trained, True)):
            torch.testing.assert_close(trace.outputs, net.train(mode)(x), atol=0.0, rtol=0.0)
            assert [f.shape[1] for f in trace.activations] == list(chain(net).widths)
            assert [gate.shape for gate in trace.gates] == [z.shape for z in trace.preactivations]
        if norm == "none":
            for z, gate, f in zip(trained.preactivations, trained.gates, trained.activations, strict=True):
                assert torch.equal(f, z * gate)


def test_silent_layers_and_nested_ones_are_passed_over() -> None:
    inner = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.9), nn.ReLU())
    net = nn.Sequential(
        nn.Flatten(), inner, nn.Identity(), nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2)
    )
    found = chain(net)
    assert [(layer.name, layer.norm_place, layer.flattens) for layer in found.layers] == [
        ("1.0", "none", True),
        ("3", "before_relu", False),
    ]
    assert found.head is net[-1]
    assert torch.equal(found.trace(torch.ones(2, 3)).outputs, net.eval()(torch.ones(2, 3)))


def test_modules_that_stand_several_times_are_read_each_time() -> None:
    relu, tied = nn.ReLU(), nn.Linear(3, 3)
    net = nn.Sequential(tied, relu, tied, relu, nn.Linear(3, 2))
    assert chain(net).widths == (3, 3)
    x = torch.ones(4, 3)
    assert torch.equal(chain(net).trace(x).outputs, net(x))


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ((), "Got no layers"),
        ((nn.Linear(2, 2),), "Got Linear '0'"),
        ((nn.Linear(2, 2), nn.ReLU()), "Got Linear '0'|Got ReLU '1'"),
        ((nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2)), "Got Linear '0'"),
        ((nn.Linear(2, 2), nn.ReLU(), nn.Conv1d(2, 2, 1)), "Got Conv1d '2'"),
        ((nn.Flatten(0, 1), nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)), "Got Flatten '0'"),
    ],
)
def test_other_networks_are_refused(layers: tuple[nn.Module, ...], message: str) -> None:
    with pytest.raises(StructureError, match=message):
        chain(nn.Sequential(*layers))
    with pytest.raises(StructureError, match="Got Linear"):
        chain(nn.Linear(2, 2))


def test_linear_layers_along_positions_are_refused() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(ShapeError, match="thalweg match"):
        chain(net).trace(torch.ones(5, 4, 3))


def test_a_pair_has_one_depth_and_as_many_outputs() -> None:
    one = chain(relu_mlp((3,), num_inputs=2, num_outputs=2))
    require_pair(one, chain(relu_mlp((7,), num_inputs=2, num_outputs=2)))
    for other in (relu_mlp((3, 3), num_inputs=2, num_outputs=2), relu_mlp((3,), num_inputs=2, num_outputs=1)):
        with pytest.raises(ShapeError, match="Build the student"):
            require_pair(one, chain(other))
