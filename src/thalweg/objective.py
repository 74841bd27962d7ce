"""objective: a landscape, the loss of a module on data as a function of theta.

Value, gradient and Hessian products are sums over mini-batches, weighted so that they equal the full-data
quantity for every batch size, a ragged last batch included.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, vmap

from thalweg.batching import Batch, Recut, adds_up, batches_of, drawn, mean_weight, num_samples
from thalweg.errors import DataError, ShapeError
from thalweg.kernels import plain_kernels
from thalweg.precision import copied, placed
from thalweg.space import Space

Loss = Callable[[Any, Any], Tensor]
Reduction = Literal["mean", "sum", "none"]


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
        self._batch_weight = batch_weight or mean_weight(self.loss, own)
        self._data = batches_of(data, batch_size)
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
        return self._like(self._data, dtype)

    def sample(self, count: int, seed: int = 0) -> "Objective":
        """Give the landscape of a fixed random sample of the data, drawn without replacement, as one batch.

        Raises:
            DataError: there are fewer samples, or the batches cannot be cut.
        """
        generator = torch.Generator().manual_seed(seed)
        return self._like([drawn(self._data, count, generator)], self.dtype)

    def num_samples(self) -> int | None:
        """Count the samples; None for batches that are not one row per sample, or that a loader gives."""
        try:
            return sum(num_samples(tuple(batch)) for batch in self._data) if self.in_memory else None
        except DataError:
            return None

    def is_additive(self, theta: Float[Tensor, " params"]) -> bool:
        """Say whether R is the same however the data are cut into batches.

        It is not if samples of a batch are coupled: by the loss, by the module, or by BatchNorm in train mode.
        Whether they are is measured, on samples drawn from the first batch: the loss of two small pieces, joined,
        must be their weighted sum up to rounding, at theta and at a point beside it (zero weights hide couplings).
        """
        if self.module.training:
            return False
        theta, first = self._checked(theta), tuple(next(iter(self._data)))
        generator = torch.Generator().manual_seed(0)
        away = torch.randn(len(theta), generator=generator, dtype=torch.float64).to(theta)
        beside = theta + _STEP * away * (theta.abs().mean() + _STEP)
        try:
            order = torch.randperm(num_samples(first), generator=generator)
            options: Any = {"is_sum": self.reduction == "sum", "dtype": self.dtype}
            measures = [functools.partial(self._weight_and_loss, point) for point in (theta, beside)]
            return len(order) > 1 and all(adds_up(first, order, measure, **options) for measure in measures)
        except _NOT_CUT:
            return False

    def recut(self, theta: Float[Tensor, " params"], size: int) -> "Objective":
        """Give the same landscape in batches of at most `size` samples; self where `is_additive` says no."""
        if not self.is_additive(theta):
            return self
        data = list(Recut(self._data, size)) if self.in_memory else Recut(self._data, size)
        return self._like(data, self.dtype)

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
        return self.run(self.space.parameters(theta.clone()), inputs)

    def run(self, parameters: Mapping[str, Tensor], inputs: Any) -> Any:
        """Run the module with the given parameters (all of the space's names) on one batch of inputs.

        Buffers and attributes of the module stay as they are; the parameters are the caller's to protect.
        """
        buffers = {name: buffer.clone() for name, buffer in self._buffers.items()}
        state = {**parameters, **self._constants, **buffers}
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

    def leaves(self, theta: Float[Tensor, " params"]) -> dict[str, Tensor]:
        """Give the parameters at theta as leaves of a graph, one for each: their gradients cost no more than they.

        A gradient with respect to theta itself would be assembled from one zero-padded vector per parameter.
        """
        return {n: v.detach().clone().requires_grad_() for n, v in self.space.parameters(theta).items()}

    def leaf_loss(self, leaves: Mapping[str, Tensor], inputs: Any, targets: Any) -> Float[Tensor, ""]:
        """Compute the loss of one batch, differentiable in the leaves, which stay as they are."""
        return self.reduced(self.run({n: leaf.clone() for n, leaf in leaves.items()}, inputs), targets)

    def _like(self, data: Any, dtype: torch.dtype) -> "Objective":
        return Objective(
            *(self.module, self.loss, data),
            reduction=self.reduction,
            batch_weight=self._batch_weight,
            mode=self.mode,
            dtype=dtype,
            device=self.device,
        )

    def _weight_and_loss(self, theta: Tensor, part: Batch) -> tuple[float, float]:
        inputs, targets = placed(part, device=self.device, dtype=self.dtype)
        weight = 1.0 if self.reduction == "sum" else self._batch_weight(targets)
        with torch.no_grad():
            return weight, float(self.batch_loss(theta, inputs, targets)) if weight else 0.0

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
                    lambda batch: vmap(lambda t: piece(t, batch), chunk_size=self.points_at_once(batch))(theta),
                    theta.new_zeros(()),
                )
            except RuntimeError:
                self._vectorizes = False
        return torch.stack(
            [self._weighted(lambda batch, t=t: piece(t, batch), theta.new_zeros(())) for t in theta]  # type: ignore[misc]
        )

    def points_at_once(self, batch: Batch) -> int:
        """Say how many points to evaluate together on a batch."""
        samples = len(batch[1]) if isinstance(batch[1], Tensor) and batch[1].ndim else _CHUNK_FLOATS
        return min(max(_CHUNK_FLOATS // (self.num_params * max(samples, 1)), _POINTS_PER_CHUNK), _MOST_POINTS)

    def _loss_and_slope(self, theta: Tensor, batch: Batch) -> Tensor:
        leaves = self.leaves(theta)
        loss = self.leaf_loss(leaves, *batch)
        if not loss.requires_grad:  # the loss does not depend on theta
            return torch.cat([loss.reshape(1), torch.zeros_like(theta)])
        slopes = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
        return torch.cat([loss.detach().reshape(1), *(slope.reshape(-1) for slope in slopes)])

    def _traced_loss_and_slope(self, theta: Tensor, batch: Batch) -> Tensor:
        slope, loss = torch.func.grad_and_value(lambda t: self.batch_loss(t, *batch))(theta)
        return torch.cat([loss.reshape(1), slope])

    def _products(self, theta: Tensor, vectors: Tensor, batch: Batch) -> Tensor:
        named = self.leaves(theta)
        leaves, loss = list(named.values()), self.leaf_loss(named, *batch)
        slopes: tuple[Tensor, ...] = ()
        if loss.requires_grad:
            slopes = torch.autograd.grad(loss, leaves, create_graph=True, materialize_grads=True)
        curved = {n: s for n, s in zip(named, slopes, strict=False) if s.requires_grad}
        if not curved:  # the loss is affine in theta
            return torch.zeros_like(vectors)

        def replay(rows: Tensor, *, batched: bool) -> Tensor:
            parts = self.space.parameters(rows)
            options = {"retain_graph": True, "materialize_grads": True, "is_grads_batched": batched}
            found = torch.autograd.grad(list(curved.values()), leaves, [parts[n] for n in curved], **options)
            return torch.cat([f.detach().reshape(*rows.shape[:-1], -1) for f in found], -1)

        if len(vectors) > 1:
            try:
                return replay(vectors, batched=True)
            except RuntimeError:  # an operation without a batching rule
                pass
        return torch.stack([replay(v, batched=False) for v in vectors])

    def _checked(self, theta: Tensor) -> Tensor:
        if theta.ndim not in (1, 2) or theta.shape[-1] != self.num_params:
            raise ShapeError(
                f"Expected theta of shape ({self.num_params},) or (points, {self.num_params}). "
                f"Got {tuple(theta.shape)}. Build it with Objective.theta(module)."
            )
        return theta.detach().to(device=self.device, dtype=self.dtype)


# Points per vmap chunk. Chosen by us: larger chunks do not pay on a CPU and cost memory in proportion, unless the
# network is so small that calls take the time: then as many as keep points x params x samples below the bound.
_POINTS_PER_CHUNK, _MOST_POINTS, _CHUNK_FLOATS = 64, 4096, 2**22
# What a batch raises that is not one row per sample, or whose size stands in the code.
_NOT_CUT = (DataError, RuntimeError, ValueError, TypeError, IndexError)
# Step to the point beside of `is_additive`, over the mean |theta|. Chosen by us, far above rounding and nearby.
_STEP = 0.01
