"""Teachers and students: layouts, the random teacher's rows, and widened students."""

from collections import OrderedDict

import pytest
import torch
from torch import nn

from thalweg.errors import ConfigError
from thalweg.nets import relu_cnn, relu_mlp, teacher_init_, widened


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_teachers_rows_have_unit_length_and_different_directions() -> None:
    for net in (relu_mlp((50, 75)), relu_cnn((8, 9), image_size=8)):
        teacher_init_(net, seeded())
        for layer in net:
            if isinstance(layer, nn.Linear | nn.Conv2d):
                rows = layer.weight.detach().flatten(1).double()
                norms = rows.norm(dim=1)
                assert float((norms - 1).abs().max()) < 1e-4
                cosines = (rows / norms.unsqueeze(1)) @ (rows / norms.unsqueeze(1)).T
                assert float((cosines - torch.eye(len(rows))).max()) < 1 - 1e-6
                assert float(layer.bias.detach().abs().max()) <= 0.5 / 0.25  # the shortest row of the grid is ¼ long


def test_a_teacher_is_decided_by_its_generator() -> None:
    first, again, other = (teacher_init_(relu_mlp((5, 6)), seeded(seed)).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["linear1.weight"], other["linear1.weight"])


@pytest.mark.parametrize("norm", ["none", "after_relu", "before_relu"])
def test_a_student_has_the_teachers_layout_and_ten_times_its_width(norm: str) -> None:
    for teacher in (relu_mlp((2, 3), num_inputs=4, norm=norm), relu_cnn((2, 3), image_size=9, norm=norm)):
        student = widened(teacher)
        assert list(dict(student.named_children())) == list(dict(teacher.named_children()))
        wide = [len(p) for name, p in student.named_parameters() if name.endswith("weight") and p.ndim > 1]
        narrow = [len(p) for name, p in teacher.named_parameters() if name.endswith("weight") and p.ndim > 1]
        assert wide == [*(10 * width for width in narrow[:-1]), narrow[-1]]
        x = torch.randn(2, *((4,) if isinstance(teacher[0], nn.Flatten) else (1, 9, 9)), generator=seeded())
        assert student(x).shape == teacher(x).shape
    assert "norm1" in dict(widened(relu_mlp((2,)), 2, norm="after_relu").named_children())
    assert widened(relu_mlp((2,), norm="after_relu", eps=1e-12)).norm1.eps == 1e-12
    assert widened(relu_mlp((2,)).double(), 2).head.weight.dtype == torch.float64


def test_refuses_what_cannot_be_built() -> None:
    with pytest.raises(ConfigError, match="Expected norm"):
        relu_mlp((2,), norm="somewhere")
    with pytest.raises(ConfigError):
        relu_mlp(())
    with pytest.raises(ConfigError, match="Use larger images"):
        relu_cnn((2, 2), image_size=4)
    with pytest.raises(ConfigError, match="Make the layer narrower"):
        teacher_init_(relu_mlp((3,), num_inputs=1), seeded())
    with pytest.raises(ConfigError, match="a factor of 1 or more"):
        widened(relu_mlp((2,)), 0)
    for layers in ((nn.Linear(2, 2),), (nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3))):
        named = zip(("conv1", "relu1", "flatten", "head"), layers, strict=False)
        with pytest.raises(ConfigError, match="Build the student itself"):
            widened(nn.Sequential(OrderedDict(named)))
