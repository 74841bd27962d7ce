"""directions: where a slice goes; random directions, a plane through three points, a trajectory's main directions."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from thalweg.errors import ConfigError, NumericalError, ShapeError
from thalweg.objective import Objective
from thalweg.space import Space

Normalize = Literal["filter", "layer", "none"]
Vectors = Literal["zero", "keep"]
Coordinates = tuple[float, float]


@dataclass(frozen=True)
class Plane:
    """A plane of theta: origin + x·directions[0] + y·directions[1].

    Args:
        origin: the point with coordinates (0, 0), shape (params,).
        directions: shape (2, params), orthonormal, so that coordinates are Euclidean lengths.
        points: name -> coordinates (x, y) of what the plane was laid through, in the order given.
        explained: fractions of Σ‖theta - origin‖² along each direction; None where that has no meaning.
    """

    origin: Float[Tensor, " params"]
    directions: Float[Tensor, "2 params"]
    points: Mapping[str, Coordinates]
    explained: Coordinates | None = None

    def coordinates(
        self, num_points: int = 51, margin: float = 0.25
    ) -> tuple[Float[Tensor, " points"], Float[Tensor, " points"]]:
        """Give the coordinates of a grid that holds every named point.

        Args:
            num_points: per axis. Default: the 51 of Li et al. 2018.
            margin: what is added on each side, as a fraction of the points' longer extent. Default: our choice.

        Returns:
            Two increasing tensors in float64, for `plane(..., coordinates=...)`.

        Raises:
            ConfigError: fewer than two points per axis, or a negative margin.
        """
        if num_points < 2 or margin < 0:
            raise ConfigError(
                f"Expected at least 2 points per axis and a margin of at least 0. Got {num_points} and {margin}. "
                "Ask for more."
            )
        places = torch.tensor(list(self.points.values()), dtype=torch.float64)
        low, high = places.amin(0), places.amax(0)
        extra = margin * (high - low).max()
        steps = torch.linspace(0, 1, num_points, dtype=torch.float64)
        x, y = (low - extra).unsqueeze(1) + (high - low + 2 * extra).unsqueeze(1) * steps
        return x, y


def random_direction(
    where: Objective | Space,
    theta: Float[Tensor, " params"],
    *,
    generator: torch.Generator,
    normalize: Normalize = "filter",
    vectors: Vectors = "zero",
) -> Float[Tensor, " params"]:
    """Draw a Gaussian direction, filter by filter as long as theta: d_ij ← d_ij·‖theta_ij‖/‖d_ij‖.

    A filter j of a tensor i is one index of the leading axis of a tensor of two and more dims: the weights into
    one unit or channel. What has one dim or none (biases, weights of norms) has no filters, see `vectors`.

    Args:
        where: the landscape, or its space: which stretch of theta is which parameter.
        theta: the point that the direction is drawn for, shape (params,).
        generator: the source of randomness.
        normalize: "filter" (default); "layer": each tensor as a whole is as long as theta's; "none".
        vectors: "zero" (default) leaves parameters of one dim where they are, as the published commands do
            (`--xignore biasbn`); "keep" draws them too, each as one vector as long as theta's.

    Returns:
        The direction, shape (params,), in theta's dtype and on its device; zero where theta's filter is zero.

    Raises:
        ShapeError: theta does not fit the space.

    **Source:** Li et al. 2018 (arXiv 1712.09913), section 4, and the published code. Departures: it divides by
    ‖d_ij‖ + 1e-10; and where it does not ignore biases, it copies theta's own instead of drawing them.

    Example:
        >>> from torch import nn
        >>> net = nn.Linear(3, 2)
        >>> space, theta = Space.of(net), torch.tensor([3.0, 4.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0])
        >>> direction = random_direction(space, theta, generator=torch.Generator().manual_seed(0))
        >>> print(f"{direction[:3].norm():.3f}", int(direction[3:].count_nonzero()))
        5.000 0
    """
    space = where.space if isinstance(where, Objective) else where
    own = space.parameters(theta.detach())
    drawn = torch.randn(len(theta), generator=generator, dtype=theta.dtype, device=generator.device)
    pieces = []
    for name, piece in space.parameters(drawn.to(theta.device)).items():
        if piece.ndim < 2 and vectors == "zero":
            scaled = torch.zeros_like(piece)
        elif normalize == "none":
            scaled = piece
        else:
            rows = (len(piece), -1) if piece.ndim >= 2 and normalize == "filter" else (1, -1)
            scaled = _as_long_as(own[name].reshape(rows), piece.reshape(rows))
        pieces.append(scaled.reshape(-1))
    return torch.cat(pieces)


def orthogonalized(directions: Float[Tensor, "axes params"]) -> Float[Tensor, "axes params"]:
    """Make each direction orthogonal to those before it, and keep its length (Gram–Schmidt, done twice).

    Two random directions of n coordinates have a cosine of about 1/√n; use this where that is not small enough.
    It undoes the normalisation by filters of every direction but the first, by as much.

    Args:
        directions: one per row, shape (axes, params).

    Returns:
        The directions, same shape; the first is unchanged.

    Raises:
        NumericalError: a direction is zero, not finite, or in the span of those before it.

    Example:
        >>> orthogonalized(torch.tensor([[2.0, 0.0], [3.0, 4.0]]))
        tensor([[2., 0.],
                [0., 5.]])
    """
    exact = directions.detach().double()
    eps = torch.finfo(directions.dtype).eps
    basis, lengths = _orthonormal(exact, eps), exact.norm(dim=1, keepdim=True)
    return torch.cat([directions[:1].detach(), (lengths * basis).to(directions.dtype)[1:]])


def three_points(a: Float[Tensor, " params"], b: Float[Tensor, " params"], c: Float[Tensor, " params"]) -> Plane:
    """Lay the plane through three points: a at the origin, b on the first axis, c above it.

    u = b - a and v = (c - a) - ⟨c - a, û⟩û, both normalised, so that a = (0, 0), b = (‖u‖, 0) and
    c = (⟨c - a, û⟩, ‖v‖); distances in the picture are distances of thetas.

    Args:
        a: shape (params,).
        b: shape (params,).
        c: shape (params,).

    Returns:
        The plane, with points "a", "b", "c", in the dtype of a.

    Raises:
        NumericalError: the points lie on one line to rounding, or are not finite.

    **Source:** Garipov et al. 2018 (arXiv 1802.10026), the planes of its Figure 1.

    Example:
        >>> plane = three_points(*torch.tensor([[1.0, 0.0, 0.0], [1.0, 2.0, 0.0], [1.0, 1.0, 3.0]]))
        >>> plane.points
        {'a': (0.0, 0.0), 'b': (2.0, 0.0), 'c': (1.0, 3.0)}
    """
    sides = torch.stack([b, c]).detach().double() - a.detach().double()
    size = max(float(p.detach().double().norm()) for p in (a, b, c))
    basis = _orthonormal(sides, torch.finfo(a.dtype).eps, size)
    x, y = basis @ sides[1]
    points = {"a": (0.0, 0.0), "b": (float(sides[0].norm()), 0.0), "c": (float(x), float(y))}
    return Plane(a.detach().clone(), basis.to(a.dtype), points)


def principal_components(thetas: Float[Tensor, "points params"], center: Literal["last", "mean"] = "last") -> Plane:
    """Lay the plane along which a trajectory moves most: the first two right singular vectors of its differences.

    The matrix of differences, (points, params), is decomposed as it is, thin, in float64; nothing of
    params × params is built. Its memory is three copies of that matrix. The sign of each direction is such
    that the first theta has a coordinate of at least 0.

    Args:
        thetas: the points of the trajectory, one per row, the last one last, shape (points, params).
        center: "last" (default): differences from the last point, which becomes the origin; "mean": from the
            mean, the usual principal components.

    Returns:
        The plane, with points "0", "1", ... and the fractions of Σ‖theta - origin‖² explained.

    Raises:
        ShapeError: fewer than three points.
        NumericalError: the points lie on one line to rounding, or are not finite.

    **Source:** Li et al. 2018 (arXiv 1712.09913), section 7.2. Departure: the published code subtracts the mean
    again from the differences (its directions are those of "mean") and draws around the last point.

    Example:
        >>> plane = principal_components(torch.tensor([[4.0, 0.0, 1.0], [0.0, 3.0, 1.0], [0.0, 0.0, 1.0]]))
        >>> plane.points["0"], plane.explained
        ((4.0, 0.0), (0.64, 0.36))
    """
    if len(thetas) < 3:
        raise ShapeError(f"Expected at least three points. Got {len(thetas)}. Record more of the trajectory.")
    exact = thetas.detach().double()
    origin = exact[-1] if center == "last" else exact.mean(0)
    differences = exact - origin
    _check_finite(differences)
    _, sizes, rows = torch.linalg.svd(differences, full_matrices=False)
    # Each entry is rounded by half an eps of itself at most, so (Weyl) no singular value by more than this.
    if len(sizes) < 2 or sizes[1] <= torch.finfo(thetas.dtype).eps * exact.norm():
        raise NumericalError(
            "Expected a trajectory that is not straight. Got points on one line. Use probes.line along it."
        )
    basis = rows[:2]
    basis = basis * torch.where(basis @ differences[0] < 0, -1.0, 1.0).unsqueeze(1).double()
    points = {str(i): (float(x), float(y)) for i, (x, y) in enumerate(differences @ basis.T)}
    first, second = (sizes[:2].square() / sizes.square().sum()).tolist()
    return Plane(origin.to(thetas.dtype), basis.to(thetas.dtype), points, (first, second))


def _as_long_as(rows: Tensor, drawn: Tensor) -> Tensor:
    """Scale each row of `drawn` to the length of that of `rows`; a row of zeros stays zero."""
    lengths = drawn.norm(dim=1, keepdim=True)
    scaled: Tensor = drawn * (rows.norm(dim=1, keepdim=True) / torch.where(lengths > 0, lengths, 1.0))
    return scaled


def _check_finite(vectors: Tensor) -> None:
    if not bool(torch.isfinite(vectors).all()):
        raise NumericalError("Expected finite points. Got NaN or infinity. Check the thetas.")


def _orthonormal(vectors: Tensor, eps: float, size: float = 0.0) -> Tensor:
    """Gram–Schmidt, twice, which is enough (Parlett): then orthogonal to rounding whatever the angles.

    A remainder within rounding (eps) of its vector, or of the points of this size that it is a difference of,
    is no direction.
    """
    _check_finite(vectors)
    basis: list[Tensor] = []
    for vector in vectors:
        project = functools.partial(_without, basis=basis)
        rest = project(project(vector))
        # Both ends of a difference are rounded, and what the user computed them from was: 8 is our choice.
        bound = 8 * eps * max(float(vector.norm()), size)
        if float(rest.norm()) <= bound:
            raise NumericalError(
                "Expected directions that span as many dimensions. Got one that is zero, or depends on those before "
                "it. Choose other points."
            )
        basis.append(rest / rest.norm())
    return torch.stack(basis)


def _without(vector: Tensor, basis: list[Tensor]) -> Tensor:
    for unit in basis:
        vector = vector - (unit @ vector) * unit
    return vector
