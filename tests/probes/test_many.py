"""Hessians of many points are those of each, for any module and loss."""

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from thalweg.errors import NumericalError, ShapeError
from thalweg.objective import Objective
from thalweg.probes import hessian, hessians, inertia, inertias, spectrum


class Branching(nn.Module):
    """Takes a branch that depends on its weights, which functorch cannot batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return torch.tanh(y) if float(self.layer.weight.detach().sum()) > 0 else y**3


def data(num_outputs: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    x = torch.randn(9, 2, generator=generator, dtype=torch.float64)
    return x, torch.randn(9, num_outputs, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("batch_size", [None, 4])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_each_hessian_is_that_of_its_point(batch_size: int | None, reduction: str) -> None:
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2), nn.GELU(), nn.Linear(2, 1)).double()
    objective = Objective(net, nn.MSELoss(reduction=reduction), data(1, generator), batch_size=batch_size)
    thetas = torch.randn(5, objective.num_params, generator=generator, dtype=torch.float64)
    for theta, matrix in zip(thetas, hessians(objective, thetas), strict=True):
        assert_close(matrix, hessian(objective, theta, "blockwise"), rtol=1e-12, atol=1e-13)
        assert_close(matrix, matrix.T, rtol=0, atol=0)


def test_a_module_that_functorch_cannot_batch_is_done_point_by_point() -> None:
    generator = torch.Generator().manual_seed(0)
    objective = Objective(Branching().double(), nn.MSELoss(), data(1, generator))
    thetas = torch.tensor([[1.0, 0.5], [-1.0, -0.5]], dtype=torch.float64)
    found = hessians(objective, thetas)
    for theta, matrix in zip(thetas, found, strict=True):
        assert_close(matrix, hessian(objective, theta), rtol=1e-12, atol=1e-14)
    assert not bool(torch.isfinite(hessians(objective, thetas * float("nan"))).any())


def test_inertias_are_those_of_the_spectra() -> None:
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    objective = Objective(net, nn.MSELoss(), data(1, generator))
    thetas = torch.randn(4, objective.num_params, generator=generator, dtype=torch.float64)
    for theta, signs in zip(thetas, inertias(objective, thetas), strict=True):
        alone = inertia(spectrum(objective, theta))
        assert (signs.negative, signs.zero, signs.positive) == (alone.negative, alone.zero, alone.positive)
    assert all(signs.zero == objective.num_params for signs in inertias(objective, thetas, threshold=1e6))


def test_no_points_have_no_hessians() -> None:
    objective = Objective(nn.Linear(2, 1).double(), nn.MSELoss(), data(1, torch.Generator()))
    assert hessians(objective, torch.zeros(0, 3, dtype=torch.float64)).shape == (0, 3, 3)


def test_points_of_another_network_are_refused() -> None:
    objective = Objective(nn.Linear(2, 1).double(), nn.MSELoss(), data(1, torch.Generator()))
    with pytest.raises(ShapeError, match=r"shape \(points, 3\)"):
        hessians(objective, torch.zeros(2, 4, dtype=torch.float64))


def test_signs_of_a_hessian_that_is_not_finite_are_refused() -> None:
    objective = Objective(nn.Linear(2, 1).double(), lambda o, t: (o**4).mean(), data(1, torch.Generator()))
    with pytest.raises(NumericalError, match="finite Hessians"):
        inertias(objective, torch.full((1, 3), float("inf"), dtype=torch.float64))
