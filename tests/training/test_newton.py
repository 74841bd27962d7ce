"""Newton's method in a trust region: it finds minima, leaves saddles, and says when it does not arrive."""

import pytest
import torch
from torch import Tensor, nn

from thalweg.data import three_tanh
from thalweg.errors import ConfigError, ShapeError
from thalweg.nets import two_layer
from thalweg.objective import Objective
from thalweg.training import minimise


def paper(width: int) -> Objective:
    data = three_tanh()
    return Objective(two_layer(width).double(), nn.MSELoss(), (data.inputs, data.targets))


def test_it_finds_the_minimum_of_the_papers_data() -> None:
    start = torch.tensor([1.0, 0.2, -7.0, 0.0, 1.0, 2.0], dtype=torch.float64)
    end = minimise(paper(2), start)
    assert end.status == "converged"
    assert end.gradient_l1 <= 1e-9
    assert end.value == pytest.approx(0.0697915, rel=1e-5)


class Saddle(nn.Module):
    """R = x² - y² + y⁴: a saddle at 0, minima at y² = 1/2."""

    def __init__(self) -> None:
        super().__init__()
        self.point = nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def forward(self, _: Tensor) -> Tensor:
        x, y = self.point
        return (x**2 - y**2 + y**4).reshape(1, 1)


def saddle(sign: float = 1.0) -> Objective:
    x = torch.zeros(1, 1, dtype=torch.float64)
    return Objective(Saddle(), lambda outputs, _: sign * outputs.sum(), (x, x), reduction="sum")


def test_it_leaves_a_saddle() -> None:
    end = minimise(saddle(), torch.tensor([0.3, 1e-3], dtype=torch.float64))
    assert end.value == pytest.approx(-0.25)
    torch.testing.assert_close(end.theta.abs(), torch.tensor([0.0, 0.5**0.5], dtype=torch.float64), atol=1e-8, rtol=0)


def test_it_says_when_there_is_no_minimum() -> None:
    end = minimise(saddle(-1.0), torch.tensor([0.3, 0.1], dtype=torch.float64), max_steps=20)
    assert end.status == "stalled"


def test_a_start_that_is_not_finite_is_said() -> None:
    assert minimise(saddle(), torch.tensor([float("nan"), 0.0], dtype=torch.float64)).status == "not finite"


@pytest.mark.parametrize(("bound", "steps"), [(0.0, 10), (-1.0, 10), (1e-9, 0)])
def test_a_bound_or_number_of_steps_that_is_not_positive_is_refused(bound: float, steps: int) -> None:
    with pytest.raises(ConfigError, match="a positive bound and number of steps"):
        minimise(saddle(), torch.zeros(2, dtype=torch.float64), gradient_l1=bound, max_steps=steps)


def test_a_theta_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ShapeError, match="Expected theta"):
        minimise(saddle(), torch.zeros(3, dtype=torch.float64))
