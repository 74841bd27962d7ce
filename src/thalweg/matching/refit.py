"""Weight adjustment: a layer refitted by least squares to what it should give, from the features that it now gets.

W = argmin ‖W F - T‖: F the features (for a convolution: patches), T the wanted pre-activations.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

import torch
from jaxtyping import Float, Int
from torch import Tensor

from thalweg.errors import ShapeError
from thalweg.matching.gram import CHUNK, Gram, Precision, Status
from thalweg.structure.sites import Site

_NOISE = {"double": 1e-5, "single": 1e-2}
"""Residuals below are recomputed from the samples: the sums cancel there. Chosen by us, 10 to 100 times the noise."""

_CHUNK_NUMBERS = CHUNK * 4096
"""Numbers in a chunk of patches, at most about."""

Chunks = Callable[[], Iterator[tuple[Tensor, Tensor]]]
"""Streams (features, targets), each (rows, groups, numbers)."""


@dataclass(frozen=True)
class Fit:
    """A layer's refitted weights.

    Args:
        weight: shaped, and of the dtype, like the layer's own.
        bias: likewise; None if the layer has none.
        residual: ‖W F + b - T‖ / ‖T‖ over the samples of the fit. 0 if the targets are all zero.
        rank: how many directions of the features counted; of a grouped convolution, the least over its groups.
        status: "cholesky", "minimum norm" (the features depend on each other, or outnumber the samples) or
            "ridge"; of a grouped convolution, "minimum norm" if any group's is.
        samples: rows of the least squares: samples, or (image, position) pairs.
        features: numbers in a row, the constant one of the bias included.
    """

    weight: Float[Tensor, "outputs ..."]
    bias: Float[Tensor, " outputs"] | None
    residual: float
    rank: int
    status: Status
    samples: int
    features: int

    @property
    def is_scarce(self) -> bool:
        """Fewer than two samples for each feature: without a ridge such a fit may do badly on other data."""
        return self.samples < 2 * self.features

    @property
    def warning(self) -> str | None:
        """What to know about a scarce fit; None if it is none."""
        if not self.is_scarce:
            return None
        return (
            f"{self.samples} samples for {self.features} features: fewer than two for each. Use a ridge (1e-4), or "
            "more data."
        )


def refit(  # noqa: PLR0913 - the layer, the data, and what decides the least squares
    site: Site,
    inputs: Float[Tensor, "..."],
    targets: Float[Tensor, "..."],
    *,
    weight: Float[Tensor, "outputs ..."],
    bias: Float[Tensor, " outputs"] | None = None,
    ridge: float = 0.0,
    prior: bool = False,
    samples_per_feature: int = 20,
    seed: int = 0,
    precision: Precision = "double",
) -> Fit:
    """Refit a layer: min ‖W F + b - T‖² + μ‖(W, b) - (W₀, b₀)‖², μ = ridge · mean diag(G).

    A linear layer takes every sample: the last axis are features, all others samples. A convolution takes patches at
    pairs (image, position), borders included: all of them, or `samples_per_feature` for each feature, drawn without
    replacement. The draw depends on shapes and seed alone, so that two calls on equally shaped inputs take the same
    pairs. Each group of a grouped convolution is a fit of its own.

    Args:
        site: the layer, as `thalweg.structure.execution` lists it.
        inputs: what the layer is applied to.
        targets: what it should give, shaped like its result, the bias included.
        weight: the layer's own: its shape and dtype are taken, and its values if `prior`.
        bias: likewise; without one the layer stays without.
        ridge: μ as a fraction of the mean square of a feature. Default 0: the paper's least squares. 1e-4 cures the
            collapse at as many samples as features (measured on MNIST, width 2,000).
        prior: draw the fit to `weight` and `bias` instead of to 0.
        samples_per_feature: of a convolution. Default 20, chosen by us; the paper's code takes a coarse grid.
        seed: of the draw.
        precision: "double", or "single" for products in float32, summed in float64; give a ridge then.

    Returns:
        The fit.

    Raises:
        ShapeError: inputs, targets and weight do not fit each other.
        DataError: no samples.
        NumericalError: an input or a target is not finite.

    **Source:** Anokhin & Yarotsky 2020 (arXiv 2008.00741), section 3.3, W = T F⁺. Departures: the bias is
        refitted too, as a constant feature; sampled patches, not every second; normal equations; ridge and prior.

    Example:
        >>> layer = torch.nn.Linear(2, 1).double()
        >>> x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        >>> site = Site("weight", "bias", 0)
        >>> fit = refit(site, x, 2 * x[:, :1] - 1, weight=layer.weight, bias=layer.bias)
        >>> (fit.weight * 1000).round().int().tolist(), fit.status, fit.residual < 1e-9
        ([[2000, 0]], 'cholesky', True)
    """
    weight, bias = weight.detach(), None if bias is None else bias.detach()
    flat = weight.reshape(site.groups, len(weight) // site.groups, -1)
    offsets = None if bias is None else bias.reshape(site.groups, -1)
    if site.kernel_dims:
        count = samples_per_feature * (flat.shape[2] + (bias is not None))
        chunks = _patches(site, inputs.detach(), targets.detach(), weight, count, seed)
    else:
        chunks = _rows(inputs.detach(), targets.detach(), weight)
    grams = [
        Gram(flat.shape[2], flat.shape[1], bias=bias is not None, precision=precision, device=weight.device)
        for _ in flat
    ]
    norm = 0.0
    for rows, wishes in chunks():
        norm = math.hypot(norm, float(torch.linalg.vector_norm(wishes, dtype=torch.float64)))
        # What the prior leaves, not the targets: so that nothing is left, exactly, where it gives the targets itself.
        left = _left(rows, wishes, flat, offsets, precision) if prior else wishes
        for group, gram in enumerate(grams):
            gram.add(rows[:, group], left[:, group])
    solutions = [gram.solve(ridge) for gram in grams]
    fitted = torch.stack([s.weight for s in solutions])
    shifts = None if bias is None else torch.stack([s.bias for s in solutions if s.bias is not None])
    if prior:
        fitted, shifts = fitted + flat, None if shifts is None or offsets is None else shifts + offsets
    residual = math.hypot(*(s.residual * g.target_norm for s, g in zip(solutions, grams, strict=True))) / (
        norm or 1.0
    )
    if norm and residual < _NOISE[precision]:
        errors = (_left(*chunk, fitted, shifts, "double") for chunk in chunks())
        residual = math.hypot(*(float(torch.linalg.vector_norm(error)) for error in errors)) / norm
    statuses = [solution.status for solution in solutions]
    return Fit(
        fitted.reshape(weight.shape).to(weight.dtype),
        None if shifts is None or bias is None else shifts.reshape(bias.shape).to(bias.dtype),
        residual,
        min(solution.rank for solution in solutions),
        "minimum norm" if "minimum norm" in statuses else statuses[0],
        grams[0].samples,
        grams[0].features,
    )


def _left(rows: Tensor, wishes: Tensor, weight: Tensor, bias: Tensor | None, precision: Precision) -> Tensor:
    """Give T - W F - b."""
    dtype = torch.float64 if precision == "double" else torch.float32
    left = wishes.to(dtype) - torch.einsum("rgf,gof->rgo", rows.to(dtype), weight.to(dtype))
    return left if bias is None else left - bias.to(dtype)


def _rows(inputs: Tensor, targets: Tensor, weight: Tensor) -> Chunks:
    """Stream the rows of a linear layer, as one group."""
    wanted = (*inputs.shape[:-1], weight.shape[0])
    if inputs.shape[-1] != weight.shape[1] or tuple(targets.shape) != wanted:
        raise _unfit(inputs, targets, weight, wanted)
    features, wishes = inputs.reshape(-1, weight.shape[1]), targets.reshape(-1, weight.shape[0])

    def chunks() -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(features), CHUNK):
            yield features[start : start + CHUNK, None], wishes[start : start + CHUNK, None]

    return chunks


def _patches(site: Site, inputs: Tensor, targets: Tensor, weight: Tensor, count: int, seed: int) -> Chunks:
    """Stream sampled patches of a convolution and the wanted results there; never all patches of a map."""
    dims, groups = site.kernel_dims, site.groups
    if inputs.ndim == dims + 1:
        inputs, targets = inputs[None], targets[None]
    geometry = _Geometry.of(site, weight)
    size = tuple(inputs.shape[2:])
    places = geometry.places(size)
    wanted = (len(inputs), weight.shape[0], *places)
    if inputs.ndim != dims + 2 or inputs.shape[1] != weight.shape[1] * groups or tuple(targets.shape) != wanted:
        raise _unfit(inputs, targets, weight, wanted)
    per_image = math.prod(places)
    pairs = sampled_positions(len(inputs) * per_image, count, seed).to(inputs.device)
    flat, wishes = inputs.flatten(2), targets.flatten(2)
    rows = min(CHUNK, max(1, _CHUNK_NUMBERS // (inputs.shape[1] * math.prod(weight.shape[2:]))))

    def chunks() -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(pairs), rows):
            chosen = pairs[start : start + rows]
            image, place = chosen // per_image, chosen % per_image
            taps, inside = geometry.taps(place, places, size)
            patches = flat[image[:, None], :, taps] * inside[..., None].to(flat)
            patches = patches.transpose(1, 2).reshape(len(chosen), groups, -1)
            yield patches, wishes[image, :, place].reshape(len(chosen), groups, -1)

    return chunks


def sampled_positions(total: int, count: int, seed: int) -> Int[Tensor, " chosen"]:
    """Draw so many of the numbers below `total`, uniformly and without replacement, in ascending order.

    Args:
        total: how many there are.
        count: how many are wanted; all, if there are no more.
        seed: of the draw, which is the same for equal arguments.

    Returns:
        The numbers.

    Example:
        >>> sampled_positions(3, 10, 0).tolist(), len(sampled_positions(10**9, 10, 0))
        ([0, 1, 2], 10)
    """
    if total <= count:
        return torch.arange(total)
    generator = torch.Generator().manual_seed(seed)
    if total <= 4 * count:
        return torch.randperm(total, generator=generator)[:count].sort().values
    chosen = torch.empty(0, dtype=torch.int64)
    while len(chosen) < count:
        drawn = torch.randint(total, (2 * count,), generator=generator)
        chosen = torch.unique(torch.cat([chosen, drawn]))
    return chosen[torch.randperm(len(chosen), generator=generator)[:count]].sort().values


@dataclass(frozen=True)
class _Geometry:
    """Where a convolution reads, along each spatial dim."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]

    @classmethod
    def of(cls, site: Site, weight: Tensor) -> "_Geometry":
        options, kernel = dict(site.options), tuple(weight.shape[2:])
        dims = len(kernel)
        stride, dilation = _each(options.get("stride", 1), dims), _each(options.get("dilation", 1), dims)
        padding = options.get("padding", 0)
        if padding == "same":
            whole = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
            before = tuple(w // 2 for w in whole)
            return cls(kernel, stride, dilation, before, tuple(w - w // 2 for w in whole))
        before = _each(0 if padding == "valid" else padding, dims)
        return cls(kernel, stride, dilation, before, before)

    def places(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """Count the positions of the kernel along each dim."""
        return tuple(
            (n + b + a - d * (k - 1) - 1) // s + 1
            for n, b, a, d, k, s in zip(
                size, self.before, self.after, self.dilation, self.kernel, self.stride, strict=True
            )
        )

    def taps(self, place: Tensor, places: tuple[int, ...], size: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Give, for positions, the flat index that each tap of the kernel reads, and whether it lies inside."""
        corners = torch.stack(torch.unravel_index(place, places), dim=-1)
        steps = torch.tensor(list(product(*(range(k) for k in self.kernel))), device=place.device)
        stride, dilation, before, sizes = (
            torch.tensor(v, device=place.device) for v in (self.stride, self.dilation, self.before, size)
        )
        reads = (corners * stride - before)[:, None, :] + (steps * dilation)[None]
        inside = ((reads >= 0) & (reads < sizes)).all(-1)
        index = torch.zeros_like(reads[..., 0])
        for dim, n in enumerate(size):
            index = index * n + reads[..., dim].clamp(0, n - 1)
        return index, inside


def _each(value: int | tuple[int, ...], dims: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * dims if len(values) == 1 else values


def _unfit(inputs: Tensor, targets: Tensor, weight: Tensor, wanted: tuple[int, ...]) -> ShapeError:
    return ShapeError(
        f"Expected targets of shape {wanted} for a weight of shape {tuple(weight.shape)}. Got inputs of shape "
        f"{tuple(inputs.shape)} and targets of shape {tuple(targets.shape)}. Take both at this layer."
    )
