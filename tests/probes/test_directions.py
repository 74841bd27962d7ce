"""directions: lengths of filters, planes that pass through their points, main directions of trajectories."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from thalweg.errors import ConfigError, NumericalError, ShapeError
from thalweg.objective import Objective
from thalweg.probes.directions import orthogonalized, principal_components, random_direction, three_points
from thalweg.probes.slices import plane
from thalweg.space import Space

exact = functools.partial(assert_close, rtol=1e-12, atol=1e-12)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 4)).double()


def draw(space: Space, theta: Tensor, seed: int = 1, **options: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return space.parameters(random_direction(space, theta, generator=generator, **options))  # type: ignore[arg-type]


SPACE = Space.of(net())
THETA = randn(SPACE.num_params)


def test_every_filter_is_as_long_as_that_of_theta() -> None:
    found, own = draw(SPACE, THETA), SPACE.parameters(THETA)
    for name in ("0.weight", "3.weight"):
        exact(found[name].flatten(1).norm(dim=1), own[name].flatten(1).norm(dim=1))
    for name in ("0.bias", "1.weight", "1.bias", "3.bias"):
        assert not bool(found[name].any())


def test_filters_are_directions_of_the_gaussian_drawn() -> None:
    """A naive re-implementation from the paper: d_ij / ‖d_ij‖ · ‖theta_ij‖."""
    drawn = torch.randn(len(THETA), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = draw(SPACE, THETA, normalize="filter", vectors="zero")["0.weight"]
    own, gaussian = (SPACE.parameters(t)["0.weight"] for t in (THETA, drawn))
    for j in range(3):
        exact(found[j], gaussian[j] / gaussian[j].norm() * own[j].norm())


def test_vectors_that_are_kept_are_scaled_once_and_as_one_vector() -> None:
    """Neither entry by entry, as filters of one weight each, nor twice."""
    found, own = draw(SPACE, THETA, vectors="keep"), SPACE.parameters(THETA)
    for name in ("0.bias", "1.weight", "1.bias", "3.bias"):
        exact(found[name].norm(), own[name].norm())
        assert float((found[name].abs() - own[name].abs()).abs().min()) > 1e-3


def test_layers_are_as_long_as_those_of_theta() -> None:
    found, own = draw(SPACE, THETA, normalize="layer"), SPACE.parameters(THETA)
    exact(found["3.weight"].norm(), own["3.weight"].norm())
    assert float((found["3.weight"].norm(dim=1) - own["3.weight"].norm(dim=1)).abs().min()) > 1e-3


def test_none_is_the_gaussian_itself() -> None:
    drawn = torch.randn(len(THETA), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = draw(SPACE, THETA, normalize="none", vectors="keep")
    assert all(torch.equal(found[name], own) for name, own in SPACE.parameters(drawn).items())
    assert not bool(draw(SPACE, THETA, normalize="none")["0.bias"].any())


def test_an_objective_serves_as_well_as_its_space_and_theta_is_kept() -> None:
    objective = Objective(net(), nn.CrossEntropyLoss(), (randn(2, 2, 4, 4), torch.zeros(2, dtype=torch.int64)))
    kept = THETA.clone()
    one, two = (random_direction(w, THETA, generator=torch.Generator().manual_seed(3)) for w in (objective, SPACE))
    assert torch.equal(one, two)
    assert torch.equal(THETA, kept)


def test_a_filter_of_zeros_has_a_direction_of_zeros() -> None:
    theta = THETA.clone()
    SPACE.parameters(theta)["3.weight"][2] = 0.0
    found = draw(SPACE, theta)["3.weight"]
    assert not bool(found[2].any())
    assert bool(torch.isfinite(found).all())


def test_float32_stays_float32() -> None:
    found = random_direction(SPACE, THETA.float(), generator=torch.Generator().manual_seed(1))
    assert found.dtype == torch.float32


def test_a_theta_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ShapeError, match="Expected theta with"):
        random_direction(SPACE, THETA[1:], generator=torch.Generator().manual_seed(1))


@settings(max_examples=30)
@given(axes=st.integers(1, 4), extra=st.integers(0, 5), seed=st.integers(0, 99))
def test_orthogonalized_directions_are_orthogonal_as_long_and_in_the_same_span(
    axes: int, extra: int, seed: int
) -> None:
    directions = randn(axes, axes + extra, seed=seed)
    found = orthogonalized(directions)
    exact(found @ found.T, torch.diag(directions.square().sum(1)))
    assert torch.equal(found[0], directions[0])
    projector = torch.linalg.pinv(directions) @ directions
    exact(found @ projector, found, rtol=1e-9, atol=1e-9)


def test_directions_at_a_tiny_angle_become_orthogonal_to_rounding() -> None:
    one, noise = randn(2, 50)
    found = orthogonalized(torch.stack([one, one + 1e-9 * noise]))
    assert abs(float(found[0] @ found[1])) < 1e-13 * float(found[0].norm() * found[1].norm())


@pytest.mark.parametrize("bad", [[[1.0, 1.0], [2.0, 2.0]], [[0.0, 0.0], [1.0, 2.0]], [[1.0, 0.0], [torch.inf, 0.0]]])
def test_directions_that_span_less_are_refused(bad: list[list[float]]) -> None:
    with pytest.raises(NumericalError, match=r"Expected directions that span|Expected finite points"):
        orthogonalized(torch.tensor(bad))


@settings(max_examples=30)
@given(seed=st.integers(0, 999), size=st.integers(2, 30), scale=st.floats(1e-3, 1e3))
def test_a_plane_passes_through_its_three_points(seed: int, size: int, scale: float) -> None:
    corners = dict(zip("abc", scale * randn(3, size, seed=seed), strict=True))
    found = three_points(**corners)
    for name, (x, y) in found.points.items():
        exact(found.origin + x * found.directions[0] + y * found.directions[1], corners[name])
    exact(found.directions @ found.directions.T, torch.eye(2, dtype=torch.float64))
    assert found.points["a"] == (0.0, 0.0)
    assert found.points["b"][1] == 0.0
    assert found.points["c"][1] > 0


def test_the_slice_of_a_plane_has_the_values_of_its_points() -> None:
    objective = Objective(nn.Linear(3, 1).double(), nn.MSELoss(), (randn(9, 3), randn(9, 1, seed=1)))
    corners = dict(zip("abc", randn(3, 4, seed=2), strict=True))
    found = three_points(**corners)
    for name, (x, y) in found.points.items():
        place = tuple(torch.tensor([c], dtype=torch.float64) for c in (x, y))
        exact(plane(objective, found.origin, found.directions, coordinates=place).loss[0, 0],  # type: ignore[arg-type]
              objective.value(corners[name]))  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_points_on_one_line_are_refused(dtype: torch.dtype) -> None:
    a, step = randn(2, 40).to(dtype)
    for b, c in ((a + step, a + 0.3 * step), (a, a + step), (a + step, a)):
        with pytest.raises(NumericalError, match="Expected directions that span"):
            three_points(a, b, c)


def test_coordinates_of_a_plane_hold_all_points_with_a_margin() -> None:
    found = three_points(*torch.tensor([[0.0, 0.0], [4.0, 0.0], [1.0, 2.0]]))
    x, y = found.coordinates(5, margin=0.25)
    exact(x, torch.tensor([-1.0, 0.5, 2.0, 3.5, 5.0], dtype=torch.float64))
    exact(y, torch.tensor([-1.0, 0.0, 1.0, 2.0, 3.0], dtype=torch.float64))
    with pytest.raises(ConfigError, match=r"Expected at least 2 points per axis"):
        found.coordinates(1)


def trajectory(points: int = 12, params: int = 30) -> Tensor:
    """A path with singular values that are known: 5, 2 and 0.1 times orthonormal factors about the last point."""
    left = torch.linalg.qr(randn(points - 1, 3, seed=4))[0]
    right = torch.linalg.qr(randn(params, 3, seed=5))[0]
    moves = left @ torch.diag(torch.tensor([5.0, 2.0, 0.1], dtype=torch.float64)) @ right.T
    return torch.cat([moves, torch.zeros(1, params, dtype=torch.float64)]) + randn(params, seed=6)


def test_the_main_directions_of_a_path_are_its_singular_vectors() -> None:
    thetas = trajectory()
    found = principal_components(thetas)
    right = torch.linalg.qr(randn(30, 3, seed=5))[0].T[:2]
    exact((found.directions @ right.T).abs(), torch.eye(2, dtype=torch.float64))
    total = 25 + 4 + 0.01
    assert found.explained == pytest.approx((25 / total, 4 / total), rel=1e-12)
    assert torch.equal(found.origin, thetas[-1])
    assert found.points["11"] == (0.0, 0.0)


@pytest.mark.parametrize("center", ["last", "mean"])
def test_they_are_the_eigenvectors_of_the_scatter_matrix(center: str) -> None:
    """The naive way, which builds params × params."""
    thetas = trajectory()
    found = principal_components(thetas, center)  # type: ignore[arg-type]
    moves = thetas - (thetas[-1] if center == "last" else thetas.mean(0))
    values, vectors = torch.linalg.eigh(moves.T @ moves)
    best = vectors.T.flip(0)[:2]
    exact((found.directions * best).sum(1).abs(), torch.ones(2, dtype=torch.float64))
    fractions = (values.flip(0)[:2] / values.sum()).tolist()
    assert found.explained == pytest.approx(fractions, rel=1e-10)
    coordinates = torch.tensor(list(found.points.values()), dtype=torch.float64)
    exact(coordinates, moves @ found.directions.T)
    assert bool((coordinates[0] >= 0).all())


def test_main_directions_do_not_need_a_matrix_of_all_pairs_of_parameters() -> None:
    thetas = randn(4, 300_000)  # params × params would be 720 GB
    assert principal_components(thetas).directions.shape == (2, 300_000)


def test_too_few_points_and_straight_paths_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"Expected at least three points. Got 2"):
        principal_components(randn(2, 5))
    for dtype in (torch.float32, torch.float64):
        straight = randn(5).to(dtype) + torch.arange(6).unsqueeze(1).to(dtype) * randn(5, seed=1).to(dtype)
        with pytest.raises(NumericalError, match=r"Expected a trajectory that is not straight"):
            principal_components(straight)
    with pytest.raises(NumericalError, match="Expected finite points"):
        principal_components(torch.full((3, 4), torch.nan))
