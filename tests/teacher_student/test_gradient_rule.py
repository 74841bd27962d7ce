"""Theorem 1 at every node and sample, theorem 2 where it is exact, and the overlap of a teacher's nodes."""

import math

import pytest
import torch
from torch import Tensor, nn

from thalweg.errors import DataError, MemoryLimitError, ShapeError, StructureError
from thalweg.nets import relu_cnn, relu_mlp, teacher_init_, widened
from thalweg.teacher_student import gradient_rule, overlap, separation_residual

NORMS = ["none", "after_relu", "before_relu"]


def pair(norm: str = "none", *, conv: bool = False) -> tuple[nn.Sequential, nn.Sequential]:
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(5)
        if conv:
            teacher = relu_cnn((2, 3), image_size=7, num_outputs=4, norm=norm)
        else:
            teacher = relu_mlp((3, 4, 5), num_inputs=4, num_outputs=3, norm=norm, affine=True)
        student = widened(teacher, 3, affine=True)
        for layer in (*teacher.modules(), *student.modules()):
            if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
                for tensor in (layer.weight.data, layer.running_var):
                    tensor.uniform_(0.5, 2.0)
                for tensor in (layer.bias.data, layer.running_mean):
                    tensor.normal_()
    return teacher, student


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(11))


@pytest.mark.parametrize("batch_statistics", [False, True])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("conv", [False, True])
def test_theorem_1_is_autograds_gradient(norm: str, conv: bool, batch_statistics: bool) -> None:
    teacher, student = pair(norm, conv=conv)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    x = drawn(7, *((1, 7, 7) if conv else (4,)))
    found = gradient_rule(teacher, student, x, batch_statistics=batch_statistics)
    assert len(found) == (2 if conv else 3)
    for layer in found:
        assert layer.at_nodes <= 1e-10
        assert layer.after_gate <= 1e-10
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())


def test_theorem_1_holds_for_other_convolutions() -> None:
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(5)
        nets = [
            nn.Sequential(
                nn.Conv2d(2, width, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(width, affine=False),
                nn.ReLU(),
                nn.Conv2d(width, 2 * width, 3, padding="same", padding_mode="circular", groups=2),
                nn.ReLU(),
                nn.Flatten(),
                nn.Linear(2 * width * 9, 4),
                nn.ReLU(),
                nn.Linear(4, 2, bias=False),
            )
            for width in (2, 4)
        ]
    for batch_statistics in (False, True):
        found = gradient_rule(*nets, drawn(4, 2, 5, 5), batch_statistics=batch_statistics)
        assert max(max(layer.at_nodes, layer.after_gate) for layer in found) <= 1e-10


def test_theorem_1_in_pieces_of_one_sample_is_the_same() -> None:
    found = gradient_rule(*pair("after_relu"), drawn(5, 4), memory=10_000)
    assert max(max(layer.at_nodes, layer.after_gate) for layer in found) <= 1e-10


@pytest.mark.parametrize("batch_statistics", [False, True])
def test_theorem_1_is_not_said_to_hold_where_there_is_a_nan(batch_statistics: bool) -> None:
    teacher, student = pair()
    student.head.weight.data[0, 0] = float("nan")
    found = gradient_rule(teacher, student, drawn(6, 4), batch_statistics=batch_statistics)
    assert all(math.isnan(layer.at_nodes) and math.isnan(layer.after_gate) for layer in found)


def test_theorem_1_refuses_what_does_not_fit() -> None:
    teacher, student = pair()
    with pytest.raises(DataError, match="two samples or more"):
        gradient_rule(*pair("before_relu"), drawn(1, 4), batch_statistics=True)
    bare = nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2, track_running_stats=False), nn.ReLU(), nn.Linear(2, 3))
    with pytest.raises(StructureError, match="running statistics"):
        gradient_rule(relu_mlp((3,), num_inputs=4, num_outputs=3), bare, drawn(5, 4))
    plain = gradient_rule(relu_mlp((3,), num_inputs=4, num_outputs=3), bare, drawn(5, 4), batch_statistics=True)
    assert max(plain[0].at_nodes, plain[0].after_gate) <= 1e-10
    with pytest.raises(MemoryLimitError, match="β as matrices"):
        gradient_rule(teacher, student, drawn(5, 4), memory=100)
    with pytest.raises(MemoryLimitError, match="or fewer samples"):
        gradient_rule(teacher, student, drawn(50, 4), batch_statistics=True, memory=100_000)
    with pytest.raises(ShapeError, match="as many hidden layers"):
        gradient_rule(relu_mlp((3,), num_inputs=4, num_outputs=3), student, drawn(5, 4))
    with pytest.raises(DataError, match="Expected samples"):
        gradient_rule(teacher, student, drawn(0, 4))


def test_theorem_2_is_exact_for_one_sample_at_every_layer() -> None:
    # One sample separates: the expectation of a product is the product of expectations.
    found = separation_residual(*pair(), drawn(1, 4))
    assert [layer.name for layer in found] == ["linear1", "linear2", "linear3", "head"]
    assert max(layer.residual for layer in found) <= 1e-12


def test_theorem_2_needs_no_assumption_at_the_head() -> None:
    *hidden, head = separation_residual(*pair(), drawn(40, 4))
    assert head.residual <= 1e-12
    assert min(layer.residual for layer in hidden) > 1e-3


def test_theorem_2_is_exact_where_all_gates_are_open() -> None:
    # With every gate open β and D are constants, and only L depends on the sample.
    teacher, student = pair()
    for net in (teacher, student):
        for name, parameter in net.named_parameters():
            if name != "head.weight":
                parameter.data.abs_()
    found = separation_residual(teacher, student, drawn(30, 4).abs())
    assert max(layer.residual for layer in found) <= 1e-12


def test_the_gradient_of_theorem_2_is_that_of_the_mean_objective() -> None:
    teacher, student = (net.double() for net in pair())
    x = drawn(1500, 4).double()
    objective = (student(x) - teacher(x).detach()).square().sum(1).mean() / 2
    layer = student.linear2
    weight, bias = torch.autograd.grad(objective, [layer.weight, layer.bias])
    size = math.hypot(float(weight.norm()), float(bias.norm()))
    assert separation_residual(teacher, student, x)[1].gradient == pytest.approx(size, rel=1e-12)


def test_theorem_2_is_about_linear_layers_only() -> None:
    with pytest.raises(StructureError, match="Conv2d"):
        separation_residual(*pair(conv=True), drawn(2, 1, 7, 7))
    with pytest.raises(StructureError, match="with one"):
        separation_residual(*pair("after_relu"), drawn(2, 4))
    with pytest.raises(DataError, match="Expected samples"):
        separation_residual(*pair(), drawn(0, 4))
    with pytest.raises(MemoryLimitError):
        separation_residual(*pair(), drawn(2, 4), memory=100)
    with pytest.raises(ShapeError):
        separation_residual(relu_mlp((3,), num_inputs=4, num_outputs=3), pair()[1], drawn(2, 4))


def test_overlap_of_half_spaces_is_that_of_their_angle() -> None:
    # d(w, w') = (π - θ)/2π and d(w, w) = 1/2; l is the arc-cosine kernel of degree 1.
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1)).double()
    theta = 2.0
    net[0].weight.data.copy_(torch.tensor([[1.0, 0.0], [math.cos(theta), math.sin(theta)]]))
    net[0].bias.data.zero_()
    turn = torch.linspace(0.0, 2 * math.pi, 100_001, dtype=torch.float64)[:-1]
    (found,) = overlap(net, torch.stack([turn.cos(), turn.sin()], 1))
    assert found.epsilon_d == pytest.approx((math.pi - theta) / math.pi, abs=1e-4)
    expected = (math.sin(theta) + (math.pi - theta) * math.cos(theta)) / math.pi
    assert found.epsilon_l == pytest.approx(expected, abs=1e-6)


def test_a_node_that_never_fires_has_no_overlap_by_its_norms_bias() -> None:
    net = nn.Sequential(nn.Linear(1, 3), nn.ReLU(), nn.BatchNorm1d(3), nn.Linear(3, 1))
    net[0].weight.data.copy_(torch.tensor([[1.0], [-1.0], [0.0]]))
    net[0].bias.data.copy_(torch.tensor([0.0, 0.0, -1.0]))
    net[2].bias.data.copy_(torch.tensor([0.0, 0.0, 3.0]))  # all that the dead node gives
    assert overlap(net, torch.linspace(-1.0, 1.0, 10).unsqueeze(1))[0].epsilon_l == 0.0


def test_overlap_leaves_dead_nodes_out() -> None:
    net = teacher_init_(relu_mlp((4,), num_inputs=3, num_outputs=2), torch.Generator().manual_seed(0))
    net.linear1.bias.data[1:] = -1e3
    (found,) = overlap(net, drawn(20, 3))
    assert (found.epsilon_d, found.epsilon_l) == (0.0, 0.0)
    with pytest.raises(DataError, match="Expected samples"):
        overlap(net, drawn(0, 3))
    with pytest.raises(StructureError):
        overlap(nn.Linear(2, 2), drawn(2, 2))
