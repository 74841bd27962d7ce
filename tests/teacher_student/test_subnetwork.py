"""A subnetwork computes what the network does when the other nodes are silent."""

import pytest
import torch
from torch import Tensor, nn

from thalweg.errors import ShapeError, StructureError
from thalweg.nets import relu_cnn, relu_mlp
from thalweg.teacher_student import chain, subnetwork


def silenced(net: nn.Sequential, kept: list[Tensor], x: Tensor) -> Tensor:
    """Run a chain layer by layer and set the activations of all other nodes to 0."""
    h, places = x, iter(kept)
    read = chain(net)
    last = {id(layer.norm if layer.norm_place == "after_relu" else None) for layer in read.layers}
    for layer in net:
        h = layer(h)
        ends = id(layer) in last or (isinstance(layer, nn.ReLU) and read.layers[0].norm_place != "after_relu")
        if ends:
            mask = torch.zeros(h.shape[1])
            mask[next(places)] = 1.0
            h = h * mask.reshape(1, -1, *(1 for _ in h.shape[2:]))
    return h


@pytest.mark.parametrize("norm", ["none", "after_relu", "before_relu"])
@pytest.mark.parametrize("conv", [False, True])
def test_computes_what_is_left_when_the_others_are_silent(norm: str, conv: bool) -> None:
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(1)
        if conv:
            net, x = relu_cnn((4, 5), image_size=7, num_outputs=2, norm=norm), torch.randn(6, 1, 7, 7)
        else:
            net, x = relu_mlp((4, 5), num_inputs=3, num_outputs=2, norm=norm, affine=True), torch.randn(6, 3)
        for layer in net:
            if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
                layer.running_mean.normal_()
                layer.running_var.uniform_(0.5, 2.0)
                layer.bias.data.normal_()
    net.eval()
    kept = [torch.tensor([2, 0]), torch.tensor([4, 1, 3])]
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    found = subnetwork(net, kept)
    assert chain(found).widths == (2, 3)
    assert not found.training
    torch.testing.assert_close(found(x), silenced(net, kept, x), atol=1e-5, rtol=1e-5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_all_nodes_in_another_order_compute_the_same() -> None:
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(1)
        net, x = relu_cnn((4, 5), image_size=7, num_outputs=2).double(), torch.randn(6, 1, 7, 7).double()
    found = subnetwork(net, [torch.tensor([3, 1, 0, 2]), torch.tensor([4, 3, 2, 1, 0])])
    torch.testing.assert_close(found(x), net(x), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("nodes", [[], [0, 0], [-1], [5]])
def test_refuses_nodes_that_are_not_there(nodes: list[int]) -> None:
    net = relu_mlp((5,), num_inputs=3, num_outputs=2)
    with pytest.raises(ShapeError, match="Expected different nodes out of 5"):
        subnetwork(net, [torch.tensor(nodes, dtype=torch.long)])


def test_refuses_other_networks_and_too_few_lists() -> None:
    with pytest.raises(ShapeError, match="for each of 1 hidden layers"):
        subnetwork(relu_mlp((5,)), [])
    grouped = nn.Sequential(nn.Conv2d(2, 4, 2, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
    with pytest.raises(StructureError, match="without groups"):
        subnetwork(grouped, [torch.tensor([0, 1])])
    tied = nn.Linear(3, 3)
    with pytest.raises(StructureError, match="one twice"):
        subnetwork(nn.Sequential(tied, nn.ReLU(), tied, nn.ReLU(), nn.Linear(3, 1)), [torch.tensor([0])] * 2)
    with pytest.raises(StructureError):
        subnetwork(nn.Linear(2, 2), [])
