"""The string method: images between two points go down the landscape, but not along the path that they form."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from thalweg.batching import Batch
from thalweg.errors import ConfigError
from thalweg.objective import Objective
from thalweg.paths.curves import Schedule, hold_then_fall
from thalweg.paths.descent import Descent, endless_batches
from thalweg.paths.leg import blend_leg
from thalweg.paths.path import Path

Progress = Callable[[int, float], None]

_EXCESS = 0.1
# Samples at once where losses are measured on all data. Chosen by us.
_MEASURED_AT_ONCE = 500
"""A segment gets an image where its loss exceeds the chord by this share of the whole profile's range. AutoNEB's."""


@dataclass(frozen=True)
class StringRun:
    """A relaxed string.

    Args:
        path: through the images, a leg for each segment.
        images: both ends included.
        positions: share of the length of the path at which each image is held.
        losses: highest loss found on the path, at the start and after each cycle.
        inserted: images that were inserted after each cycle.
        status: "finished", or "diverged" (NaN or infinity): then the images are those of the best cycle before.
        seconds: wall time.
    """

    path: Path
    images: Float[Tensor, "images params"]
    positions: tuple[float, ...]
    losses: tuple[float, ...]
    inserted: tuple[int, ...]
    status: Literal["finished", "diverged"]
    seconds: float


def string(  # noqa: PLR0913 - one relaxation; each keyword is one of its settings
    objective: Objective,
    a: Float[Tensor, " params"],
    b: Float[Tensor, " params"],
    *,
    generator: torch.Generator,
    images: int = 3,
    cycles: int = 4,
    steps: int = 250,
    batch_size: int = 128,
    learning_rate: float = 0.01,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    schedule: Schedule = hold_then_fall,
    insert: bool = True,
    most_images: int = 20,
    between: int = 4,
    start_buffers: Mapping[str, Tensor] | None = None,
    end_buffers: Mapping[str, Tensor] | None = None,
    progress: Progress | None = None,
) -> StringRun:
    """Relax a string of images from the straight line to a path of least loss.

    Each step takes the gradient g of one mini-batch at every image, takes out its part along the path,
    g - (g·τ)τ, and moves the images; then they are put back to their shares of the length. τ points to the
    neighbour of higher loss. After each cycle but the last, the loss is measured on the segments, and where it
    exceeds the straight line between two images by more than 10 % of its range, an image is inserted, highest
    first. At its end, the highest point of the string is a saddle.

    Args:
        objective: the landscape, with the training data. BatchNorm takes the statistics of the batch, also where
            losses are measured; dropout, which draws from torch's own generator, is off there.
        a: the start.
        b: the end.
        generator: of the order of the data, on the CPU.
        images: free images at the start.
        cycles: rounds of relaxation.
        steps: mini-batches in each. The paper takes 1,000 and more; 250 is chosen by us.
        batch_size: samples of a mini-batch.
        learning_rate: η, before the schedule. The last of the paper's (0.1, 0.01, 0.001) that suit all cycles.
        momentum: of each image.
        weight_decay: λ at the images.
        schedule: factor of η for the share of all steps that is done.
        insert: whether images are inserted.
        most_images: free images at most.
        between: points of each segment at which the loss on all data is measured.
        start_buffers: buffers of the network at the start, by name.
        end_buffers: those at the end.
        progress: called as `progress(cycle, highest loss)`.

    Returns:
        The run.

    Raises:
        ConfigError: settings that are not positive, or more images than `most_images`.
        ShapeError: a point does not fit the module.
        DataError: the data cannot be cut into mini-batches.

    **Source:** AutoNEB: Draxler et al. 2018 (arXiv 1803.00885), section 3, with the infinitely stiff springs of
    their experiments; images are held at their shares of the length, so inserted ones stay close together.

    Example:
        >>> from torch import nn
        >>> x = torch.linspace(-1, 1, 8).unsqueeze(1)
        >>> objective = Objective(nn.Linear(1, 1), nn.MSELoss(), (x, 2 * x))
        >>> a, b = torch.tensor([2.0, 1.0]), torch.tensor([2.0, -1.0])
        >>> run = string(objective, a, b, cycles=1, steps=5, generator=torch.Generator().manual_seed(0))
        >>> len(run.path.legs), run.status
        (4, 'finished')
    """
    _require_settings((images, cycles, steps, batch_size, between), images, most_images, learning_rate, momentum)
    begun = time.perf_counter()
    relaxed = _String(objective, a, b, images, momentum, weight_decay)
    highest, inserted = [max(relaxed.profile(between)[0])], list[int]()
    last = kept = relaxed.copied()
    best = math.inf
    stream = endless_batches(objective, batch_size, generator)
    status: Literal["finished", "diverged"] = "finished"
    for cycle in range(cycles):
        for step, batch in enumerate(islice(stream, steps)):
            share = (cycle * steps + step) / (cycles * steps)
            if not relaxed.step(batch, learning_rate * schedule(share)):
                break
        losses, places = relaxed.profile(between)
        highest.append(max(losses) if all(map(math.isfinite, losses)) else math.nan)
        if progress is not None:
            progress(cycle + 1, highest[-1])
        if not math.isfinite(highest[-1]):
            status = "diverged"
            break
        last = relaxed.copied()
        if highest[-1] <= best:
            best, kept = highest[-1], last
        wanted = insert and cycle + 1 < cycles
        inserted.append(relaxed.insert(losses, places, most_images) if wanted else 0)
    points, positions = kept if status == "diverged" else last
    space = objective.space
    edges = list(pairwise(space.parameters(point) for point in points))
    legs = tuple(blend_leg(f"segment {k + 1} of {len(edges)}", *edge) for k, edge in enumerate(edges))
    path = Path(space, legs, tuple(q - p for p, q in pairwise(positions)), start_buffers or {}, end_buffers or {})
    seconds = time.perf_counter() - begun
    return StringRun(path, points, tuple(positions), tuple(highest), tuple(inserted), status, seconds)


class _String:
    """The images, their velocities and the shares of the length at which they are held."""

    def __init__(
        self, objective: Objective, a: Tensor, b: Tensor, images: int, momentum: float, weight_decay: float
    ) -> None:
        ends = []
        for end in (a, b):
            objective.space.parameters(end)
            ends.append(end.detach().to(device=objective.device, dtype=objective.dtype))
        self._objective, self._descent = objective, Descent(objective)
        self._momentum, self._weight_decay = momentum, weight_decay
        self._positions = [k / (images + 1) for k in range(images + 2)]
        inner = [torch.lerp(ends[0], ends[1], position) for position in self._positions[1:-1]]
        self._points = torch.stack([ends[0], *inner, ends[1]])
        self._velocity = torch.zeros_like(self._points[1:-1])
        self._measured_on = objective.recut(self._points[0], _MEASURED_AT_ONCE)

    def step(self, batch: Batch, rate: float) -> bool:
        """Move the images by one mini-batch and put them back to their places; False if a loss is not finite."""
        descent = self._descent
        losses = []
        slopes = torch.empty_like(self._velocity)
        for k, point in enumerate(self._points):
            descent.theta.copy_(point)
            if 0 < k < len(self._points) - 1:
                loss, slopes[k - 1] = descent.flat_slope(batch)
            else:
                loss = descent.loss(batch)
            losses.append(loss)
        if not all(map(math.isfinite, losses)):
            return False
        slopes.add_(self._points[1:-1], alpha=self._weight_decay)
        for k, slope in enumerate(slopes):
            tangent = self._points[k + 2] - self._points[k + 1]
            if losses[k] > losses[k + 2]:
                tangent = self._points[k + 1] - self._points[k]
            square = tangent.square().sum()
            if square > 0:
                slope.sub_(tangent, alpha=float((slope @ tangent) / square))
        self._velocity.mul_(self._momentum).add_(slopes)
        self._points[1:-1].add_(self._velocity, alpha=-rate)
        self._redistribute()
        return True

    def profile(self, between: int) -> tuple[list[float], list[float]]:
        """Measure the loss on all data at every image and within every segment; give it with the positions."""
        places = [
            low + (high - low) * k / (between + 1)
            for low, high in pairwise(self._positions)
            for k in range(between + 1)
        ]
        losses = []
        for number in range(len(places) + 1):
            segment, within = divmod(number, between + 1)
            upper = min(segment + 1, len(self._points) - 1)
            torch.lerp(self._points[segment], self._points[upper], within / (between + 1), out=self._descent.theta)
            losses.append(self._descent.measured(self._measured_on.weighted_batches()))
        return losses, [*places, 1.0]

    def insert(self, losses: Sequence[float], places: Sequence[float], most: int) -> int:
        """Insert images where the loss exceeds the chord, highest first; say how many."""
        per_segment = (len(places) - 1) // (len(self._points) - 1)
        least = _EXCESS * (max(losses) - min(losses))
        found = []
        for segment in range(len(self._points) - 1):
            start = segment * per_segment
            low, high = losses[start], losses[start + per_segment]
            excess = {k: losses[start + k] - low - (high - low) * k / per_segment for k in range(1, per_segment)}
            k = max(excess, key=excess.__getitem__)
            if excess[k] > least:
                found.append((losses[start + k], segment, k / per_segment))
        chosen = sorted(found, reverse=True)[: most - len(self._velocity)]
        for _, segment, share in sorted(chosen, key=lambda f: -f[1]):  # from the end: earlier segments keep numbers
            low, high = self._positions[segment : segment + 2]
            self._positions.insert(segment + 1, low + share * (high - low))
            image = torch.lerp(self._points[segment], self._points[segment + 1], share).unsqueeze(0)
            self._points = torch.cat([self._points[: segment + 1], image, self._points[segment + 1 :]])
            at = [self._velocity[:segment], torch.zeros_like(image), self._velocity[segment:]]
            self._velocity = torch.cat(at)
        return len(chosen)

    def copied(self) -> tuple[Tensor, list[float]]:
        """Give images and positions as they are now."""
        return self._points.clone(), list(self._positions)

    def _redistribute(self) -> None:
        """Put every image at its share of the length, on the polygon that the images form."""
        lengths = torch.stack([(q - p).norm() for p, q in pairwise(self._points)]).double()
        reached = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        if not bool(reached[-1] > 0):
            return
        wanted = torch.tensor(self._positions[1:-1], dtype=torch.float64, device=reached.device) * reached[-1]
        segment = (torch.searchsorted(reached, wanted, right=True) - 1).clamp(0, len(lengths) - 1)
        shares = ((wanted - reached[segment]) / lengths[segment]).clamp(0, 1).to(self._points)
        self._points[1:-1] = torch.lerp(self._points[segment], self._points[segment + 1], shares.unsqueeze(1))


def _require_settings(
    counts: Sequence[int], images: int, most_images: int, learning_rate: float, momentum: float
) -> None:
    if min(counts) < 1 or images > most_images or not (0 < learning_rate < math.inf and 0 <= momentum < 1):
        raise ConfigError(
            f"Expected positive counts, at most {most_images} images, learning_rate > 0 and momentum in [0, 1). Got "
            f"counts {tuple(counts)} (the first are the images), {learning_rate} and {momentum}. Mend them."
        )
