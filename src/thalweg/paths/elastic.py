"""The elastic string: images between two points fall down the landscape, held together by springs."""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path as File
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from thalweg.batching import Batch
from thalweg.checkpoint import load_state, save_state
from thalweg.errors import ConfigError, ShapeError
from thalweg.objective import Objective
from thalweg.paths.descent import endless_batches, training_batches
from thalweg.paths.leg import LazyLeg
from thalweg.paths.path import Path
from thalweg.paths.saved import Held
from thalweg.paths.streamed import Streamed
from thalweg.paths.string import Progress

# A segment gets an image where its loss exceeds the chord by this share of the whole profile's range. AutoNEB's.
_EXCESS = 0.1
# Numbers of each image that the springs move at once, in double precision. Chosen by us: within a processor's cache.
_CHUNK = 2**16

Images = list[dict[str, Tensor]]


@dataclass(frozen=True)
class ElasticRun:
    """A relaxed elastic string.

    Args:
        path: through the images, a leg for each segment; legs are made when they are looked at.
        images: named parameters, both ends included; an end is read anew whenever it is asked for a tensor.
        positions: where each image stood on the straight line when it was put there, in [0, 1].
        losses: highest loss found on the path, at the start and after each cycle.
        inserted: images that were inserted after each cycle.
        status: "finished", or "diverged" (NaN or infinity): then the images are those of the best cycle before, or
            the straight line.
        seconds: wall time.
    """

    path: Path
    images: tuple[Mapping[str, Tensor], ...]
    positions: tuple[float, ...]
    losses: tuple[float, ...]
    inserted: tuple[int, ...]
    status: Literal["finished", "diverged"]
    seconds: float


def elastic_string(  # noqa: PLR0913 - one relaxation; each keyword is one of its settings
    objective: Objective,
    a: Float[Tensor, " params"] | Mapping[str, Tensor],
    b: Float[Tensor, " params"] | Mapping[str, Tensor],
    *,
    generator: torch.Generator,
    images: int = 3,
    stiffness: float = 10.0,
    learning_rate: float = 0.1,
    batch_size: int = 50,
    cycles: int = 3,
    steps: int | None = None,
    insert: bool = True,
    most_images: int = 9,
    between: int = 4,
    kept_in: str | File | None = None,
    start_buffers: Mapping[str, Tensor] | None = None,
    end_buffers: Mapping[str, Tensor] | None = None,
    progress: Progress | None = None,
) -> ElasticRun:
    """Let images between two points fall down the loss of mini-batches, held together by springs.

    From the straight line, the images x_1 … x_n go down L(x_1) + … + L(x_n) + E with the elastic energy
    E = ½k Σ_i w_i·|x_{i+1} - x_i|², x_0 = a and x_{n+1} = b fixed. A step is explicit in the loss and implicit
    (backward Euler) in E, whose gradient is kT·x - k·e: T has w_{i-1} + w_i on its diagonal and -w_i beside it, and
    e is w_0·a at the first image, w_n·b at the last. With the slopes g_i of one mini-batch and the rate η,

        x ← (I + ηkT)⁻¹·(x - ηg + ηk·e).

    The factors of this step are 1/(1 + ηkλ) for the eigenvalues λ > 0 of T (in (0, 4) for evenly spaced images): at
    every k the springs are stable, and the string is as stable as its images alone. It rests only where
    ∇L + ∇E = 0. k → ∞ gives the straight line with the images at their positions, k = 0 lets them fall freely.

    Springs: w_i = h/(s_{i+1} - s_i) for images at the positions s_i, h = 1/(n+1) with the n images of the start.
    So w = 1 at the start, which is the paper's E; the straight line is at rest, as w_i·(x_{i+1} - x_i) = h·(b - a)
    on it wherever the images stand; and a segment that is cut in two is as stiff as it was.

    After each cycle but the last, an image is inserted wherever the loss on a segment exceeds the straight line
    between two images by more than 10 % of the range of all losses, highest first.

    Memory: the images, and the largest tensor of the network once more. Measuring between images takes one network
    more (`between=0` measures at the images alone), keeping the best cycle while the next one runs takes the images
    again (in files with `kept_in`). The ends are read one tensor at a time: a `StateFile`, or a mapping that
    computes what it is asked for, takes no memory. `Objective(hollow(module), …)` saves the objective's own weights.

    Args:
        objective: the landscape, with the training data. BatchNorm takes the statistics of the batch, also where
            losses are measured, which is done in the objective's own batches; dropout is off there.
        a: the start, theta or named parameters (further names, such as buffers, are passed over).
        b: the end.
        generator: of the order of the data, on the CPU.
        images: free images at the start. The default of the paper's code, five points with the ends.
        stiffness: k. The paper's code adds κ·(x_{i+1} + x_{i-1} - 2x_i) once a step, not scaled by η, so that
            κ ≈ ηk while it is small; its default κ = 1 at η = 0.1 is ours, 10.
        learning_rate: η. The default of the paper's code, as the next one.
        batch_size: samples of a mini-batch.
        cycles: rounds of relaxation; the paper's code makes 3 passes over the data.
        steps: mini-batches in each. Default: one pass over the data.
        insert: whether images are inserted; the paper does not.
        most_images: free images at most. Chosen by us: each takes the memory of a network.
        between: points of each segment at which the loss on all data is measured. As in `string`.
        kept_in: folder for the images of the best cycle; its files are of use only in this run. Default: in memory.
        start_buffers: buffers of the network at the start, by name.
        end_buffers: those at the end.
        progress: called as `progress(cycle, highest loss)`.

    Returns:
        The run.

    Raises:
        ConfigError: settings out of range, more images than `most_images`, or insertion without points between.
        ShapeError: an end does not fit the module.
        DataError: the data cannot be cut into mini-batches.
        CheckpointError: `kept_in` cannot be written.

    **Source:** d'Ascoli et al. 2019 (arXiv 1906.06766), appendix C, equation 2. Departures: their code adds the
    elastic force explicitly, image after image, which diverges for κ > 1; springs for uneven positions are ours;
    insertion is that of AutoNEB, Draxler et al. 2018 (arXiv 1803.00885), section 3.

    Example:
        >>> from torch import nn
        >>> x = torch.linspace(-1, 1, 8).unsqueeze(1)
        >>> objective = Objective(nn.Linear(1, 1), nn.MSELoss(), (x, 2 * x))
        >>> a, b = torch.tensor([2.0, 1.0]), torch.tensor([2.0, -1.0])
        >>> run = elastic_string(objective, a, b, cycles=1, generator=torch.Generator().manual_seed(0))
        >>> len(run.path.legs), run.status
        (4, 'finished')
    """
    _require_settings((images, cycles, steps or 1, batch_size), images, most_images, (learning_rate, stiffness))
    if between < 0 or (insert and between == 0):
        raise ConfigError(
            f"Expected between >= 1, or between = 0 with insert=False. Got {between}. Without points between the "
            "images nothing says where one is missing."
        )
    begun = time.perf_counter()
    relaxed = _Elastic(objective, (a, b), images, learning_rate, stiffness)
    highest, inserted = [_highest(relaxed.profile(between))], list[int]()
    best = _Best(highest[0], relaxed.positions, None if kept_in is None else File(kept_in))
    stream = endless_batches(objective, batch_size, generator)
    status: Literal["finished", "diverged"] = "finished"
    for cycle in range(cycles):
        batches = training_batches(objective, batch_size, generator) if steps is None else islice(stream, steps)
        is_finite = all(map(relaxed.step, batches))
        losses = relaxed.profile(between) if is_finite else [math.nan]
        highest.append(_highest(losses))
        if progress is not None:
            progress(cycle + 1, highest[-1])
        if not math.isfinite(highest[-1]):
            relaxed.restore(best)
            status = "diverged"
            break
        is_last = cycle + 1 == cycles
        if not highest[-1] > best.loss and not is_last:
            best.keep(highest[-1], relaxed.positions, relaxed.images)
        inserted.append(relaxed.insert(losses, most_images) if insert and not is_last else 0)
    points = [Held(point) for point in (relaxed.ends[0], *relaxed.images, relaxed.ends[1])]
    label = f"segment {{}} of {len(points) - 1}"
    legs = tuple(LazyLeg(label.format(k + 1), *edge) for k, edge in enumerate(pairwise(points)))
    gaps = tuple(q - p for p, q in pairwise(relaxed.positions))
    return ElasticRun(
        path=Path(objective.space, legs, gaps, start_buffers or {}, end_buffers or {}),
        images=tuple(point.values for point in points),
        positions=tuple(relaxed.positions),
        losses=tuple(highest),
        inserted=tuple(inserted),
        status=status,
        seconds=time.perf_counter() - begun,
    )


class _End(Mapping[str, Tensor]):
    """An end as named parameters on the objective's device and in its type, each made when it is asked for."""

    def __init__(self, objective: Objective, point: Tensor | Mapping[str, Tensor]) -> None:
        space = objective.space
        self._values = space.parameters(point.detach()) if isinstance(point, Tensor) else point
        self._shapes = dict(zip(space.names, space.shapes, strict=True))
        self._device, self._dtype = objective.device, objective.dtype
        lacking = set(self._shapes) - set(self._values)
        if lacking:
            raise ShapeError(
                f"Expected a point with every parameter of the module. Got one without {min(lacking)!r}. "
                "Pass named parameters or a whole state."
            )

    def __getitem__(self, name: str) -> Tensor:
        shape, value = self._shapes[name], self._values[name]
        if tuple(value.shape) != shape:
            raise ShapeError(
                f"Expected {name!r} of shape {shape}. Got {tuple(value.shape)}. Pass a point of this module."
            )
        return value.detach().to(device=self._device, dtype=self._dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


class _Elastic:
    """The images, and the positions that tell how stiff the springs between them are."""

    def __init__(
        self,
        objective: Objective,
        ends: tuple[Tensor | Mapping[str, Tensor], Tensor | Mapping[str, Tensor]],
        images: int,
        rate: float,
        stiffness: float,
    ) -> None:
        self.ends = tuple(_End(objective, end) for end in ends)
        self._rate, self._stiffness, self._spacing = rate, stiffness, 1 / (images + 1)
        self._network = Streamed(objective)
        self._device = objective.device
        self._end_losses = [self._network.measured(dict(end)) for end in self.ends]
        self.positions = [k / (images + 1) for k in range(images + 2)]
        self.images = self._on_the_line(self.positions)

    def step(self, batch: Batch) -> bool:
        """Move the images by one mini-batch, then by the springs; False if a loss is not finite."""
        for image in self.images:
            if not math.isfinite(self._network.descend(image, batch, self._rate)):
                return False
        self._pull()
        return True

    def profile(self, between: int) -> list[float]:
        """Measure the loss on all data at every image, and at points within every segment."""
        points: list[Mapping[str, Tensor]] = [self.ends[0], *self.images, self.ends[1]]
        known = {0: self._end_losses[0], len(points) - 1: self._end_losses[1]}
        losses = []
        within = {name: torch.empty_like(value) for name, value in self.images[0].items()} if between else {}
        for number in range((len(points) - 1) * (between + 1) + 1):
            segment, k = divmod(number, between + 1)
            if k == 0:
                losses.append(known[segment] if segment in known else self._network.measured(points[segment]))
                continue
            for name, value in within.items():
                value.copy_(points[segment][name]).lerp_(points[segment + 1][name], k / (between + 1))
            losses.append(self._network.measured(within))
        return losses

    def insert(self, losses: Sequence[float], most: int) -> int:
        """Insert images where the loss exceeds the chord, highest first; say how many."""
        chosen = _excesses(losses, len(self.positions) - 1)[: most - len(self.images)]
        points: list[Mapping[str, Tensor]] = [self.ends[0], *self.images, self.ends[1]]
        for segment, share in sorted(chosen, reverse=True):  # from the end: earlier segments keep their numbers
            low, high = self.positions[segment : segment + 2]
            self.positions.insert(segment + 1, low + share * (high - low))
            p, q = points[segment : segment + 2]
            self.images.insert(segment, {name: p[name].clone().lerp_(q[name], share) for name in self.ends[0]})
        return len(chosen)

    def restore(self, best: "_Best") -> None:
        """Go back to the images of the best cycle."""
        self.positions = list(best.positions)
        self.images = []  # first, so that their memory is free
        self.images = best.images(self._device) or self._on_the_line(self.positions)

    def _on_the_line(self, positions: Sequence[float]) -> Images:
        images: Images = [{} for _ in positions[1:-1]]
        for name in self.ends[0]:
            value = self.ends[0][name]
            for image in images:
                image[name] = value.clone(memory_format=torch.contiguous_format)
            value = self.ends[1][name]
            for image, position in zip(images, positions[1:-1], strict=True):
                image[name].lerp_(value, position)
        return images

    def _pull(self) -> None:
        """Take the springs' part of the step: a weighted mean of the images, then shares of one end and the other.

        The step is Mx + p·a + q·b with weights that sum to 1. It is made as rows of M of sum 1, then a move
        towards a by p/(1 - q), then one towards b by q, so that one end is needed at a time.
        """
        if self._stiffness == 0:
            return
        mean, shares = spring_weights(self.positions, self._rate * self._stiffness * self._spacing)
        for name in self.ends[0]:
            rows = [image[name].view(-1) for image in self.images]
            mean = mean.to(rows[0].device)
            for start in range(0, len(rows[0]), _CHUNK):
                pieces = [row[start : start + _CHUNK] for row in rows]
                for piece, mixed in zip(pieces, mean @ torch.stack(pieces).double(), strict=True):
                    piece.copy_(mixed)
            for end, share in zip(self.ends, shares, strict=True):
                value = end[name]
                for image, weight in zip(self.images, share, strict=True):
                    image[name].lerp_(value, weight)
                del value


def spring_weights(positions: Sequence[float], pull: float) -> tuple[Tensor, tuple[list[float], list[float]]]:
    """Give the weights of one implicit step of the springs: of the images, then of each end.

    Args:
        positions: of all points, ends included.
        pull: ηk·h, so that the spring of a segment is pull over its length.

    Returns:
        Rows of sum 1 in double precision; for each end the share by which each image moves towards it.
    """
    springs = torch.tensor([pull / (q - p) for p, q in pairwise(positions)], dtype=torch.float64)
    system = torch.eye(len(springs) - 1, dtype=torch.float64) + torch.diag(springs[:-1] + springs[1:])
    system -= torch.diag(springs[1:-1], 1) + torch.diag(springs[1:-1], -1)
    inverse = torch.linalg.inv(system)
    first, last = springs[0] * inverse[:, 0], springs[-1] * inverse[:, -1]
    kept = inverse.sum(1)
    return inverse / kept.unsqueeze(1), ((first / (kept + first)).tolist(), last.tolist())


class _Best:
    """The best cycle so far: nothing while it is the straight line, then its images, in memory or in files."""

    def __init__(self, loss: float, positions: Sequence[float], folder: File | None) -> None:
        self.loss, self.positions = loss, tuple(positions)
        self._folder, self._images, self._files = folder, Images(), list[File]()

    def keep(self, loss: float, positions: Sequence[float], images: Images) -> None:
        """Keep a copy of these images instead."""
        self.loss, self.positions = loss, tuple(positions)
        self._images = []
        if self._folder is None:
            self._images = [{name: value.clone() for name, value in image.items()} for image in images]
            return
        self._files = [self._folder / f"image-{k}.safetensors" for k in range(1, len(images) + 1)]
        for file, image in zip(self._files, images, strict=True):
            save_state(file, image)

    def images(self, device: torch.device) -> Images:
        """Give the images back; none for the straight line."""
        return self._images or [{n: v.to(device) for n, v in load_state(file).items()} for file in self._files]


def _excesses(losses: Sequence[float], segments: int) -> list[tuple[int, float]]:
    """Find the segments whose loss exceeds the chord, and where, highest first."""
    per_segment = (len(losses) - 1) // segments
    least = _EXCESS * (max(losses) - min(losses))
    found = []
    for segment in range(segments):
        start = segment * per_segment
        low, high = losses[start], losses[start + per_segment]
        excess = {k: losses[start + k] - low - (high - low) * k / per_segment for k in range(1, per_segment)}
        k = max(excess, key=excess.__getitem__)
        if excess[k] > least:
            found.append((losses[start + k], segment, k / per_segment))
    return [(segment, share) for _, segment, share in sorted(found, reverse=True)]


def _highest(losses: Sequence[float]) -> float:
    return max(losses) if all(map(math.isfinite, losses)) else math.nan


def _require_settings(counts: Sequence[int], images: int, most_images: int, rates: tuple[float, float]) -> None:
    learning_rate, stiffness = rates
    if min(counts) < 1 or images > most_images or not (0 < learning_rate < math.inf and 0 <= stiffness < math.inf):
        raise ConfigError(
            f"Expected positive counts, at most {most_images} images, learning_rate > 0 and stiffness >= 0. Got "
            f"counts {tuple(counts)} (the first are the images), {learning_rate} and {stiffness}. Mend them."
        )
