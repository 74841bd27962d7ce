"""The rates that theorems 4 and 5 promise, from the constants of their assumptions as measured."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from thalweg.errors import ConfigError, ShapeError
from thalweg.teacher_student.overlaps import Overlaps

_ROUNDS = 200


@dataclass(frozen=True)
class Constants:
    """The constants of assumptions 2 and 3 and of lemma 4, for nodes within an angle of their centres.

    Args:
        angle: θ_0, within which they were measured.
        eps_d: ε_d, largest overlap of gates of two centres, relative to either's own.
        eps_l: ε_l, the same of activations.
        lipschitz_d: K_d; infinite if overlaps appear where there was none.
        lipschitz_l: K_l.
        curvature: C_0 of lemma 4.
        own_d: least ψ_d(w, w) of a centre.
        own_l: least ψ_l(w, w).
    """

    angle: float
    eps_d: float
    eps_l: float
    lipschitz_d: float
    lipschitz_l: float
    curvature: float
    own_d: float
    own_l: float


@dataclass(frozen=True)
class Bound:
    """A rate that a theorem promises, or why it promises none.

    Args:
        rate: factor per step, 1 - η λ̄ γ; None where the bound is vacuous.
        gamma: γ; None where there is none above 0.
        overlap: λ̄ (theorem 4: d̄).
        reason: why it is vacuous; empty where it is not.
    """

    rate: float | None
    gamma: float | None
    overlap: float
    reason: str = ""


def measured_constants(
    overlaps: Overlaps,
    centres: Float[Tensor, "nodes d"],
    *,
    angle: float,
    generator: torch.Generator,
    draws: int = 16,
) -> Constants:
    """Measure the constants of the assumptions on weights drawn within an angle of each centre.

    Args:
        overlaps: where ψ_d and ψ_l come from.
        centres: W*, and for theorem 5 the starts of the r-set, one a row.
        angle: θ_0 in radians, above 0.
        generator: of the draws.
        draws: weights around each centre; angles are uniform up to θ_0, the first is θ_0 itself.

    Returns:
        The constants. Those of Lipschitz kind are the largest over the draws: a larger one may exist between them.

    Raises:
        ConfigError: the angle is not in (0, π/2), there are fewer than 2 draws, or a centre is zero.
        ShapeError: centres have a single coordinate.

    Source:
        tian2019luck (arXiv 1905.13405), assumptions 2 and 3, lemma 4. Departure: assumption 2 is read as
        |ψ(w, w1) - ψ(w, w2)| <= ψ(w, w1) K ‖w1 - w2‖, which lemma 2 uses; as printed, with 1 + K‖w1 - w2‖, it
        would not make ψ continuous.

    Example:
        >>> from thalweg.teacher_student.overlaps import GAUSSIAN
        >>> found = measured_constants(GAUSSIAN, torch.eye(2), angle=0.1, generator=torch.Generator().manual_seed(0))
        >>> found.eps_d, found.own_l
        (0.5, 0.5)
    """
    if not 0 < angle < math.pi / 2 or draws < 2:
        raise ConfigError(f"Expected an angle in (0, pi/2) and 2 or more draws. Got {angle}, {draws}. Change them.")
    norms = centres.norm(dim=1, keepdim=True)
    if not bool((norms > 0).all()):
        raise ConfigError("Expected centres that have a direction. Got one that is zero or NaN. Leave it out.")
    w = centres / norms
    near = drawn_near(w, angle, draws, generator)
    d, activations = overlaps.gates(w, w), overlaps.activations(w, w)
    return Constants(
        angle=angle,
        eps_d=_overlap(d),
        eps_l=_overlap(activations),
        lipschitz_d=_lipschitz(overlaps.gates(near.flatten(0, 1), near.flatten(0, 1)), near),
        lipschitz_l=_lipschitz(overlaps.activations(near.flatten(0, 1), near.flatten(0, 1)), near),
        curvature=_curvature(overlaps, w, near),
        own_d=float(d.diag().min()),
        own_l=float(activations.diag().min()),
    )


def drawn_near(
    w: Float[Tensor, "nodes d"], angle: float, draws: int, generator: torch.Generator
) -> Float[Tensor, "nodes draws d"]:
    """Draw unit vectors around unit vectors.

    Args:
        w: centres of norm 1, one a row.
        angle: θ_0, the largest angle; the first draw is at θ_0 itself, the others are uniform up to it.
        draws: around each.
        generator: of the draws.

    Returns:
        The vectors, all of norm 1.

    Raises:
        ShapeError: vectors have a single coordinate, so that none lies at a small angle to them.

    Source:
        ours: where the premises of tian2019luck's theorems 4 and 5 have to hold.

    Example:
        >>> near = drawn_near(torch.eye(2), 0.1, 3, torch.Generator().manual_seed(0))
        >>> round(float(near[0, 0] @ torch.tensor([1.0, 0.0])), 4)
        0.995
    """
    if w.shape[1] < 2:
        raise ShapeError(f"Expected vectors of 2 or more coordinates. Got {w.shape[1]}. Use more inputs.")
    shape = (len(w), draws, w.shape[1])
    sideways = torch.randn(shape, generator=generator, dtype=torch.float64).to(w)
    sideways = sideways - torch.einsum("ncd,nd->nc", sideways, w).unsqueeze(2) * w.unsqueeze(1)
    sideways = sideways / sideways.norm(dim=2, keepdim=True)
    angles = angle * torch.rand(shape[:2], generator=generator, dtype=torch.float64).to(w).unsqueeze(2)
    angles[:, 0] = angle
    found: Tensor = angles.cos() * w.unsqueeze(1) + angles.sin() * sideways
    return found


def _overlap(matrix: Tensor) -> float:
    off = matrix - matrix.diag().diag()
    own = torch.minimum(matrix.diag().unsqueeze(1), matrix.diag())
    return float(torch.where(off > 0, off / own, torch.zeros_like(off)).max())  # silent nodes overlap with none


def _lipschitz(matrix: Tensor, near: Tensor) -> float:
    """Take the largest |ψ(w, w1) - ψ(w, w2)| / (ψ(w, w1) ‖w1 - w2‖) with w1, w2 around the same centre."""
    nodes, draws, _ = near.shape
    values = matrix.reshape(-1, nodes, draws)
    change = (values.unsqueeze(3) - values.unsqueeze(2)).abs()
    distance = torch.cdist(near, near, compute_mode="donot_use_mm_for_euclid_dist")
    moved = change > 1e-14 * matrix.max()
    return float(torch.where(moved, change / (values.unsqueeze(3) * distance), torch.zeros_like(change)).max())


def _curvature(overlaps: Overlaps, w: Tensor, near: Tensor) -> float:
    """Take the largest |l*_jj - l_jj| / (l*_jj ‖δw‖²)."""
    found = 0.0
    for centre, around in zip(w, near, strict=True):
        theirs = overlaps.activations(around, centre.unsqueeze(0)).flatten()
        own = torch.stack([overlaps.activations(r.unsqueeze(0), r.unsqueeze(0))[0, 0] for r in around])
        square = (around - centre).square().sum(1)
        change = (theirs - own).abs()
        kept = (square > min(1e-6, float(square.max()) / 100)) & (change > 0)  # not so near that rounding counts
        found = max(found, float(torch.where(kept, change / (theirs * square), torch.zeros_like(change)).max()))
    return found


def bound_of_theorem_4(found: Constants, *, nodes: int, step: float, start_overlap: float) -> Bound:
    """Compute theorem 4's rate for max_j sin θ_j: 1 - η d̄ γ with γ = cos θ_0 - (m - 1) ε_d M_d.

    Args:
        found: the constants, around the teacher's weights.
        nodes: m.
        step: η.
        start_overlap: min_j d*_jj at the start.

    Returns:
        The bound; vacuous where γ or d̄ is not above 0, or the step above 1 / ψ_d(w, w).

    Raises:
        ConfigError: a number is not positive.

    Source:
        tian2019luck (arXiv 1905.13405), theorem 4 and equations 33 to 40. Departures: d̄ must be a lower bound, so
        1 - 2 K_d sin(θ_0/2) stands in it as in equation 43, not 1 + …; and of d*_jj at the start and at w*_j the
        smaller one is taken, since from the start a node may have to go twice θ_0.

    Example:
        >>> separated = Constants(0.1, 0.0, 0.0, 0.0, 1.0, 0.5, 0.25, 0.25)
        >>> round(bound_of_theorem_4(separated, nodes=4, step=0.1, start_overlap=0.25).rate, 4)
        0.9751
    """
    if nodes < 1 or not 0 < step < math.inf:
        raise ConfigError(f"Expected a node or more and a positive step. Got {nodes}, {step}. Change them.")
    turned = 2 * found.lipschitz_d * math.sin(found.angle / 2)
    spread = (1 + found.lipschitz_d) * (1 + turned) ** 2 / math.cos(found.angle / 2)
    gamma = math.cos(found.angle) - ((nodes - 1) * (_product(found.eps_d, spread)))
    overlap = (1 - turned) * min(start_overlap, found.own_d)
    return _bound(gamma, overlap, step, found.own_d)


def bound_of_theorem_5(
    found: Constants, *, teachers: int, students: int, step: float, fan_out: float, fan_out_error: float
) -> Bound:
    """Compute theorem 5's rate, 1 - η λ̄ γ, with the largest γ that solves its equations.

    C_{d,r}, how far the r-set moves, contains γ itself: γ is lowered from its value without it until it stays.

    Args:
        found: the constants, around W* and the r-set's starts.
        teachers: m.
        students: n.
        step: η.
        fan_out: B_v, the norm of every v*_j; that of the r-set's v_j at the start is not larger.
        fan_out_error: B_δv, the largest ‖v_j - v*_j‖ of the u-set at the start.

    Returns:
        The bound; vacuous where no γ above 0 exists, or the step is above 1 / ψ_l(w, w) or
        1 / (B_v² ψ_d(w, w)).

    Raises:
        ConfigError: a number is out of its range, or there are fewer students than teachers.

    Source:
        tian2019luck (arXiv 1905.13405), equations 41 to 54. Departures: 41 and 42 bound γ from above (printed: γ >=);
        41 is multiplied by B_v, as its terms are products of two fan-outs (66; printed as for B_v = 1);
        C contains K already (47, 48), so d̄ is (1 - C) d, not (1 - K C) d (43); a node of the r-set has m nodes of
        the u-set and n - m - 1 others beside it (54); C_{l,r} is K_l times the distance of equation 70. Not
        mended: the proof compares ‖δw‖, ‖δv‖ and ‖v_r‖ as if they were of one size, so a transient may be slower,
        and takes (B_v + B_δv) B_v for products of two fan-outs of the u-set, which are (B_v + B_δv)² at most.

    Example:
        >>> separated = Constants(0.1, 0.0, 0.0, 0.0, 1.0, 0.5, 0.25, 0.25)
        >>> sizes = {"teachers": 2, "students": 4, "fan_out": 1.0, "fan_out_error": 0.2}
        >>> bound_of_theorem_5(separated, step=0.1, **sizes).rate < 0.99
        True
    """
    if not (1 <= teachers <= students and 0 < step < math.inf and 0 < fan_out < math.inf and fan_out_error >= 0):
        raise ConfigError(
            "Expected as many students as teachers at least, a positive step and fan-out, and an error >= 0. Got "
            f"{students}, {teachers}, {step}, {fan_out}, {fan_out_error}. Change them."
        )
    sizes, fan = (teachers, students), (fan_out, fan_out_error)
    gamma, overlap = min(fan_out, 1.0), min(found.own_d, found.own_l)
    for _ in range(_ROUNDS):
        lowered, overlap, distance = _lowered(found, sizes, step, fan, (gamma, overlap))
        if not distance <= 2 * math.sin(found.angle / 2):
            return Bound(None, None, max(overlap, 0.0), "the r-set may leave where constants hold")
        if not (lowered > 0 and overlap > 0):
            return Bound(None, None, max(overlap, 0.0), "no gamma above 0 solves equations 41 and 42")
        if abs(lowered - gamma) <= 1e-13:
            break
        gamma = lowered
    return _bound(gamma, overlap, step, max(fan_out**2 * found.own_d, found.own_l))


def _lowered(
    found: Constants, sizes: tuple[int, int], step: float, fan: tuple[float, float], before: tuple[float, float]
) -> tuple[float, float, float]:
    """Give γ, λ̄ and the r-set's distance by equations 41 to 54 from γ and λ̄ before."""
    (b_v, b_dv), (gamma, overlap) = fan, before
    half = math.sin(found.angle / 2)
    crowd, distance = _crowds(found.lipschitz_d, found.angle, sizes, 0.0), 0.0
    rest = overlap * gamma * (2 - step * overlap * gamma)
    for _ in range(_ROUNDS):  # C_{d,r} contains B_{d,r}, which contains C_{d,r}
        push = _product(found.eps_d, crowd) * (b_v + b_dv) * b_v
        new = push / rest if rest > 0 else _product(push, math.inf)  # a step that is too large sums up to anything
        if not math.isfinite(new) or abs(new - distance) <= 1e-14:
            distance = new
            break
        distance = new
        crowd = _crowds(found.lipschitz_d, found.angle, sizes, _product(found.lipschitz_d, distance))
    turned = [max(2 * k * half, _product(k, distance)) for k in (found.lipschitz_d, found.lipschitz_l)]
    crowd_l = _crowds(found.lipschitz_l, found.angle, sizes, _product(found.lipschitz_l, distance))
    new_overlap = min((1 - turned[0]) * found.own_d, (1 - turned[1]) * found.own_l)
    first = b_v * ((b_v - b_dv) * math.cos(found.angle) - _product(found.eps_d, crowd) * (b_v + b_dv))
    second = 1 - _product(found.eps_l, crowd_l) - 2 * found.curvature * half * (1 + b_dv)
    return min(first, second, gamma), min(new_overlap, overlap), distance


def _crowds(k: float, angle: float, sizes: tuple[int, int], moved: float) -> float:
    """Give max(B_u, B_r): what all other nodes weigh together (equations 49 to 54)."""
    m, n = sizes
    near, cosine = 1 + 2 * k * math.sin(angle / 2), math.cos(angle / 2)
    far = 1 + moved
    uu, ur, ru, rr = near * near / cosine, near * far, near * far / cosine, far * far
    others = m * ru + (n - m - 1) * rr if n > m else 0.0
    return (1 + k) * max((m - 1) * uu + (n - m) * ur, others)


def _product(a: float, b: float) -> float:
    """Multiply, and take 0 · ∞ as 0: no overlap is none, whatever it is scaled by."""
    return 0.0 if a == 0 or b == 0 else a * b


def _bound(gamma: float, overlap: float, step: float, own: float) -> Bound:
    if not gamma > 0:
        return Bound(None, None, max(overlap, 0.0), "gamma is not above 0")
    if not overlap > 0:
        return Bound(None, gamma, 0.0, "the least overlap with the own teacher may vanish")
    if step * own > 1:  # a factor 1 - η d or 1 - η l of the proofs is negative
        return Bound(None, gamma, overlap, "the step is larger than the proof allows")
    return Bound(1 - step * overlap * gamma, gamma, overlap)
