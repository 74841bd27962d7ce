"""objective: a landscape, the loss of a module on data as a function of theta.

Value, gradient and Hessian products are sums over mini-batches, weighted so that they equal the full-data
quantity for every batch size, a ragged last batch included.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional

from thalweg.errors import DataError, ShapeError
from thalweg.kernels import plain_kernels
from thalweg.precision import copied, placed
from thalweg.space import Space

Loss = Callable[[Any, Any], Tensor]
Reduction = Literal["mean", "sum", "none"]
Batch = tuple[Any, Any]


class Objective:
    """The landscape of a module: R(theta) = Σ_b w_b·loss_b / Σ_b w_b for a mean loss, Σ_b loss_b for a sum.

    The module is copied; the user's own, its buffers and its train/eval mode are never touched. Nor is theta,
    whatever the module does to its weights (`max_norm`, a clamp): each evaluation runs on a copy.

    Args:
        module: any `nn.Module`. Its trainable parameters are the coordinates of theta.
        loss: `loss(outputs, targets) -> Tensor`, a scalar, or one value per element if `reduction="none"`.
        data: one pair `(inputs, targets)` whose targets are a tensor, or a re-iterable of pairs (a list, a
            DataLoader). Inputs may be a tensor, a tuple (positional arguments) or a dict (keyword arguments).
        reduction: how the loss sums up one batch. Default: the loss's own `.reduction`, else "mean".
        batch_weight: weight w_b of a batch under a mean, from its targets. Default: what the loss divides by.
            For torch's elementwise losses (MSE, L1, Huber, BCE, ...), the number of target elements; for a
            cross-entropy, the class weights of the targets that it counts; for any other callable, the number
            of samples: if yours averages over elements and samples differ in length, pass `Tensor.numel`.
        batch_size: split tensors into batches of this many samples. Default: one batch.
        mode: "eval" (default: the landscape of the network that is deployed) or "train" (BatchNorm uses the
            statistics of each batch; the value then depends on the batches).
        dtype: floating type of the computation. Default: the module's own.
        device: where to compute. Default: the module's own.

    Raises:
        DataError: the data are empty, of a kind that cannot be read twice, or not pairs; on use, no target
            counts in the loss.
        ShapeError: the module has no trainable parameter; on use, the loss is not a scalar.
        StructureError: a trainable parameter is complex, or the module cannot be copied.

    Example:
        >>> x = torch.linspace(-1, 1, 5).unsqueeze(1)
        >>> objective = Objective(nn.Linear(1, 1), nn.MSELoss(), (x, 2 * x), dtype=torch.float64)
        >>> float(objective.value(torch.tensor([2.0, 0.0], dtype=torch.float64)))
        0.0
    """

    def __init__(  # noqa: PLR0913 - one noun, built once: each keyword is a property of the landscape
        self,
        module: nn.Module,
        loss: Loss,
        data: Any,
        *,
        reduction: Reduction | None = None,
        batch_weight: Callable[[Any], float] | None = None,
        batch_size: int | None = None,
        mode: Literal["eval", "train"] = "eval",
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self.space = Space.of(module)
        reference = next(p for p in module.parameters() if p.requires_grad)
        self.dtype = dtype or reference.dtype
        self.device = torch.device(device) if device is not None else reference.device
        place = functools.partial(copied, device=self.device, dtype=self.dtype)
        self.module = place(module).train(mode == "train")
        self.mode: Literal["eval", "train"] = mode
        self.loss: Loss = place(loss) if isinstance(loss, nn.Module) else loss
        options = loss.keywords if isinstance(loss, functools.partial) else {}
        own = reduction or options.get("reduction", getattr(loss, "reduction", "mean"))
        self.reduction: Reduction = own if own in ("sum", "none") else "mean"
        self._batch_weight = batch_weight or _mean_weight(self.loss, own)
        self._data = _batches(data, batch_size)
        self.in_memory = isinstance(self._data, list)  # else a loader, to be streamed on every pass
        self._vectorizes = True
        trainable = set(self.space.names)
        self._constants = {n: p.detach() for n, p in self.module.named_parameters() if n not in trainable}
        self._buffers = dict(self.module.named_buffers())
        self._parts = list(self.module.modules())

    @property
    def num_params(self) -> int:
        """Number of coordinates of theta."""
        return self.space.num_params

    def theta(self, module: nn.Module | None = None) -> Float[Tensor, " params"]:
        """Give the point at which a module stands (default: the module this objective was built on)."""
        return self.space.theta(module or self.module).to(device=self.device, dtype=self.dtype)

    def in_dtype(self, dtype: torch.dtype) -> "Objective":
        """Give the same landscape computed in another floating type, from the data as they were passed."""
        return Objective(
            *(self.module, self.loss, self._data),
            reduction=self.reduction,
            batch_weight=self._batch_weight,
            mode=self.mode,
            dtype=dtype,
            device=self.device,
        )

    def value(self, theta: Float[Tensor, "*points params"]) -> Float[Tensor, "*points"]:
        """Compute R(theta) on all data, at one point or at several, without a graph.

        Raises:
            ShapeError: theta does not fit the module.
        """
        theta = self._checked(theta)
        if theta.ndim == 1:
            with torch.no_grad():
                return self._weighted(lambda batch: self.batch_loss(theta, *batch), theta.new_zeros(()))
        with torch.no_grad():
            return self._over_points(lambda t, batch: self.batch_loss(t, *batch), theta)

    def gradient(self, theta: Float[Tensor, "*points params"]) -> Float[Tensor, "*points params"]:
        """Compute ∇R(theta) on all data, at one point or at several.

        Raises:
            ShapeError: theta does not fit the module.
        """
        return self.value_and_gradient(theta)[1]

    def value_and_gradient(
        self, theta: Float[Tensor, "*points params"]
    ) -> tuple[Float[Tensor, "*points"], Float[Tensor, "*points params"]]:
        """Compute R(theta) and ∇R(theta) in one pass over the data.

        Raises:
            ShapeError: theta does not fit the module.
        """
        theta = self._checked(theta)
        if theta.ndim == 1:
            packed = self._weighted(lambda b: self._loss_and_slope(theta, b), theta.new_zeros(len(theta) + 1))
        else:
            packed = self._over_points(self._traced_loss_and_slope, theta)
        return packed[..., 0], packed[..., 1:]

    def hvp(self, theta: Float[Tensor, " params"], vector: Float[Tensor, " params"]) -> Float[Tensor, " params"]:
        """Compute the Hessian–vector product ∇²R(theta)·v on all data, by double backward.

        Raises:
            ShapeError: theta or the vector does not fit the module.
        """
        return self.hvp_block(theta, vector.unsqueeze(0))[0]

    def hvp_block(
        self, theta: Float[Tensor, " params"], vectors: Float[Tensor, "vectors params"]
    ) -> Float[Tensor, "vectors params"]:
        """Compute ∇²R(theta)·v for several vectors, one per row, with one gradient graph per batch.

        Raises:
            ShapeError: theta or the vectors do not fit the module.
        """
        theta = self._checked(theta)
        vectors = self._checked(vectors)
        return self._weighted(lambda b: self._products(theta, vectors, b), torch.zeros_like(vectors))

    def per_sample(self, theta: Float[Tensor, " params"]) -> Float[Tensor, " samples"]:
        """Compute the loss of every sample alone, in the order of the data; NaN where the loss ignores it.

        Raises:
            ShapeError: theta does not fit the module.
        """
        theta = self._checked(theta)
        pieces = []
        with torch.no_grad(), plain_kernels():
            for inputs, targets in self.batches():
                outputs = self.apply(theta, inputs)
                pieces.append(vmap(lambda o, t: self.reduced(o.unsqueeze(0), t.unsqueeze(0)))(outputs, targets))
        return torch.cat(pieces)

    def outputs(self, theta: Float[Tensor, " params"]) -> Tensor:
        """Compute the module's outputs on all inputs, concatenated along the samples.

        Raises:
            ShapeError: theta does not fit the module.
        """
        theta = self._checked(theta)
        with torch.no_grad(), plain_kernels():
            return torch.cat([self.apply(theta, inputs) for inputs, _ in self.batches()])

    def batches(self) -> Iterator[Batch]:
        """Yield the data on the device, floating tensors in the dtype."""
        for inputs, targets in self._data:
            yield tuple(placed(part, device=self.device, dtype=self.dtype) for part in (inputs, targets))

    def apply(self, theta: Float[Tensor, " params"], inputs: Any) -> Any:
        """Run the module at theta on one batch of inputs; differentiable in theta.

        Neither theta nor a buffer nor an attribute of the module is changed, whatever the module writes to.
        """
        buffers = {name: buffer.clone() for name, buffer in self._buffers.items()}
        state = {**self.space.parameters(theta.clone()), **self._constants, **buffers}
        args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
        before = [(vars(m), vars(m).copy()) for m in self._parts]
        try:
            return functional_call(self.module, state, args if isinstance(args, tuple) else (args,), kwargs)
        finally:
            for attributes, kept in before:
                for name in attributes.keys() - kept.keys():
                    del attributes[name]
                attributes.update(kept)

    def weighted_batches(self) -> Iterator[tuple[float, Batch]]:
        """Yield (w_b, batch) such that R = Σ w_b·loss_b, divided by Σ w_b under a mean; w_b = 1 for a sum.

        Weights are relative to the first, so that a single batch is not rounded by its weight.

        Raises:
            DataError: under a mean, all weights are zero.
        """
        unit = 0.0
        for batch in self.batches():
            weight = 1.0 if self.reduction == "sum" else self._batch_weight(batch[1])
            unit = unit or weight
            if weight:
                yield weight / unit, batch
        if unit == 0.0:
            raise DataError(
                "Expected at least one target that counts in the loss. Got a total weight of 0. "
                "Check ignore_index and the class weights."
            )

    def batch_loss(self, theta: Float[Tensor, " params"], inputs: Any, targets: Any) -> Float[Tensor, ""]:
        """Compute the loss of one batch at theta, differentiable."""
        return self.reduced(self.apply(theta, inputs), targets)

    def reduced(self, outputs: Any, targets: Any) -> Tensor:
        """Apply the loss to one batch of outputs, as a scalar: their mean under reduction "none"."""
        losses = self.loss(outputs, targets)
        if self.reduction == "none":
            return losses.mean()
        if losses.numel() != 1:
            raise ShapeError(
                f"Expected a scalar loss. Got shape {tuple(losses.shape)} under {self.reduction!r}. "
                "Pass reduction='none' for a loss per element."
            )
        return losses.reshape(())

    def _weighted(self, piece: Callable[[Batch], Tensor], zero: Tensor) -> Tensor:
        total, weights = zero, 0.0
        with plain_kernels():
            for weight, batch in self.weighted_batches():
                total = total + weight * piece(batch)
                weights += weight
        return total if self.reduction == "sum" else total / weights

    def _over_points(self, piece: Callable[[Tensor, Batch], Tensor], theta: Tensor) -> Tensor:
        """Batch the points with vmap; loop where the module does what vmap cannot (data-dependent flow)."""
        if self._vectorizes and not self.module.training:
            try:
                return self._weighted(
                    lambda batch: vmap(lambda t: piece(t, batch), chunk_size=_POINTS_PER_CHUNK)(theta),
                    theta.new_zeros(()),
                )
            except RuntimeError:
                self._vectorizes = False
        return torch.stack(
            [self._weighted(lambda batch, t=t: piece(t, batch), theta.new_zeros(())) for t in theta]  # type: ignore[misc]
        )

    def _loss_and_slope(self, theta: Tensor, batch: Batch) -> Tensor:
        point = theta.detach().requires_grad_()
        loss = self.batch_loss(point, *batch)
        if not loss.requires_grad:  # the loss does not depend on theta
            return torch.cat([loss.reshape(1), torch.zeros_like(point)])
        (slope,) = torch.autograd.grad(loss, point)
        return torch.cat([loss.detach().reshape(1), slope])

    def _traced_loss_and_slope(self, theta: Tensor, batch: Batch) -> Tensor:
        slope, loss = torch.func.grad_and_value(lambda t: self.batch_loss(t, *batch))(theta)
        return torch.cat([loss.reshape(1), slope])

    def _products(self, theta: Tensor, vectors: Tensor, batch: Batch) -> Tensor:
        point = theta.detach().requires_grad_()
        loss = self.batch_loss(point, *batch)
        slope = loss
        if loss.requires_grad:
            (slope,) = torch.autograd.grad(loss, point, create_graph=True)
        if not slope.requires_grad:  # the loss is affine in theta
            return torch.zeros_like(vectors)
        options = {"retain_graph": True, "materialize_grads": True}
        replay = functools.partial(torch.autograd.grad, slope, point, **options)
        if len(vectors) > 1:
            try:
                return replay(vectors, is_grads_batched=True)[0].detach()
            except RuntimeError:  # an operation without a batching rule
                pass
        return torch.stack([replay(v)[0].detach() for v in vectors])

    def _checked(self, theta: Tensor) -> Tensor:
        if theta.ndim not in (1, 2) or theta.shape[-1] != self.num_params:
            raise ShapeError(
                f"Expected theta of shape ({self.num_params},) or (points, {self.num_params}). "
                f"Got {tuple(theta.shape)}. Build it with Objective.theta(module)."
            )
        return theta.detach().to(device=self.device, dtype=self.dtype)


# Points per vmap chunk. Chosen by us: larger chunks do not pay on a CPU and cost memory in proportion.
_POINTS_PER_CHUNK = 64


def _batches(data: Any, batch_size: int | None) -> Any:
    if isinstance(data, Iterator):
        raise DataError(
            "Expected data that can be read more than once. Got a one-shot iterator. "
            "Pass a list of (inputs, targets) pairs or a DataLoader."
        )
    if isinstance(data, tuple) and len(data) == 2 and isinstance(data[1], Tensor) and data[1].ndim:
        return _split(*data, batch_size)
    if batch_size is not None:
        raise DataError(
            "Expected batch_size only with a pair of tensors. Got data that already come in batches. "
            "Set the batch size of the loader."
        )
    if not isinstance(data, Iterable):
        raise DataError(
            f"Expected (inputs, targets) or batches of them. Got a {type(data).__name__}. Wrap it in a list."
        )
    first = next(iter(data), None)
    if first is None:
        raise DataError("Expected at least one batch. Got empty data. Check the loader.")
    if not isinstance(first, tuple | list) or len(first) != 2:
        raise DataError(
            f"Expected batches (inputs, targets). Got a {type(first).__name__}. "
            "Wrap the loader so that it yields pairs."
        )
    return data


def _split(inputs: Any, targets: Tensor, batch_size: int | None) -> list[Batch]:
    """Cut one pair into batches along the leading axis of its tensors."""
    parts = inputs.values() if isinstance(inputs, dict) else inputs if isinstance(inputs, tuple) else (inputs,)
    counts = {len(part) for part in parts} | {len(targets)}
    if len(counts) != 1 or 0 in counts:
        raise DataError(f"Expected as many inputs as targets, at least one. Got {sorted(counts)}. Check the data.")

    def cut(rows: slice) -> Any:
        if isinstance(inputs, dict):
            return {key: part[rows] for key, part in inputs.items()}
        return tuple(part[rows] for part in inputs) if isinstance(inputs, tuple) else inputs[rows]

    size = batch_size or len(targets)
    rows = [slice(start, start + size) for start in range(0, len(targets), size)]
    return [(cut(r), targets[r]) for r in rows]


# Losses whose mean is over elements: modules, and functions by name.
_MODULES = (
    *(nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss, nn.BCELoss, nn.BCEWithLogitsLoss),
    *(nn.PoissonNLLLoss, nn.GaussianNLLLoss, nn.KLDivLoss, nn.SoftMarginLoss, nn.HingeEmbeddingLoss),
)
_FUNCTIONS = """mse_loss l1_loss smooth_l1_loss huber_loss binary_cross_entropy binary_cross_entropy_with_logits
    poisson_nll_loss gaussian_nll_loss kl_div soft_margin_loss hinge_embedding_loss""".split()


def _mean_weight(loss: Any, reduction: str) -> Callable[[Any], float]:
    """Weight of a batch under a mean loss: what the loss itself divides by ("batchmean": the samples)."""
    function: Any = loss.func if isinstance(loss, functools.partial) else loss
    options = loss.keywords if isinstance(loss, functools.partial) else {}
    if isinstance(function, nn.Module):
        options = vars(function) | dict(function.named_buffers())
    if isinstance(function, nn.CrossEntropyLoss | nn.NLLLoss):
        function = functional.cross_entropy
    if function in (functional.cross_entropy, functional.nll_loss):
        return functools.partial(_class_weight, options=options, reduction=reduction)
    elementwise = isinstance(function, _MODULES) or function in [getattr(functional, name) for name in _FUNCTIONS]
    return Tensor.numel if elementwise and reduction != "batchmean" else _num_samples


def _class_weight(targets: Tensor, options: Mapping[str, Any], reduction: str) -> float:
    if targets.is_floating_point():  # probabilities of the classes, which lie along dim 1 (dim 0: one sample)
        return float(targets.numel() // targets.shape[min(1, targets.ndim - 1)])
    if reduction == "none":
        return float(targets.numel())
    weight, kept = options.get("weight"), targets[targets != options.get("ignore_index", -100)]
    return float(kept.numel() if weight is None else weight.to(kept.device)[kept].sum())


def _num_samples(targets: Any) -> float:
    while not isinstance(targets, Tensor):
        targets = next(iter(targets.values() if isinstance(targets, dict) else targets))
    return float(len(targets)) if targets.ndim else 1.0
