"""fused: one fully connected student in training without autograd: the products themselves, and nothing that waits.

A weight and its bias are one matrix, read by activations with a column of ones beside them, so that a layer is three
products: forward, backward, and the step itself, W ← W - η·gᵀh, accumulated straight into the weights.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from thalweg.errors import ShapeError, StructureError
from thalweg.teacher_student.chain import BatchNorm, Chain, Layer, LinearMap, chain
from thalweg.teacher_student.stepping import Masks


class FusedStepper:
    """A chain of linear layers, ReLUs and BatchNorms in either place; a `Stepper`.

    Args:
        student: its values are copied.
        masks: linear parameter -> 0 where it is held at zero, 1 elsewhere.
        batch_size: samples of a step.

    Source:
        tian2019luck (arXiv 1905.13405), Lemma 1 for the backward pass of BatchNorm, here with torch's ε.
    """

    def __init__(self, student: nn.Module, masks: Masks, batch_size: int) -> None:
        if not is_fusable(student):
            raise StructureError(
                "Expected a chain of Linear layers with biases, trained whole, and torch's own BatchNorm1d. Got "
                'another network. Take engine="autograd".'
            )
        found = chain(student)
        names = {id(module): name for name, module in student.named_modules()}
        self._names = list(student.state_dict())
        self._layers = [_Hidden(layer, names, masks, batch_size) for layer in found.layers]
        self._head = _Dense(found.head, names[id(found.head)], masks)
        self._error = _buffer(self._head.matrix, batch_size, found.head.out_features)
        self._batch_size, self._flattens = batch_size, found.layers[0].flattens

    @torch.no_grad()
    def advance(self, inputs: Tensor, targets: Tensor, rates: Sequence[float]) -> Tensor:
        """Take one step for each rate; arguments and result as of `Stepper`."""
        if inputs.ndim > 2 and not self._flattens:
            raise ShapeError(
                f"Expected samples of one axis, as the network has no Flatten. Got {tuple(inputs.shape)}. Put one "
                'before it, or take engine="autograd", which runs along the other axes.'
            )
        size, num_outputs = self._batch_size, self._error.shape[1]
        x = inputs.flatten(1)
        x = _joined(x, torch.ones_like(x[:, 0]))
        squares = torch.zeros((), dtype=torch.float64, device=x.device)
        for ours, theirs, rate in zip(torch.split(x, size), torch.split(targets, size), rates, strict=True):
            h = ours
            for layer in self._layers:
                h = layer.forward(h)
            torch.addmm(theirs, h, self._head.transposed, beta=-1, out=self._error)
            flat = self._error.view(-1)
            squares += torch.dot(flat, flat)
            self._back(ours, 2 * rate / (size * num_outputs))
        return squares / (size * num_outputs)

    def state(self) -> dict[str, Tensor]:
        """Give parameters and buffers by their names, as copies."""
        found = self._head.state()
        for layer in self._layers:
            found |= layer.state()
        return {name: found[name].clone() for name in self._names}

    def _back(self, x: Tensor, scale: float) -> None:
        """Take the step, from the head down; the gradient that reaches a layer is read before its reader moves."""
        upper, g = self._head, self._error
        for layer in reversed(self._layers):
            torch.mm(g, upper.weight, out=layer.gradient)
            upper.step(g, layer.read, scale)
            g = layer.backward(scale)
            upper = layer.dense
        upper.step(g, x, scale)


class _Dense:
    """A linear layer as one matrix, its bias in the last column."""

    def __init__(self, linear: LinearMap, name: str, masks: Masks) -> None:
        self._name = name
        self.matrix = _joined(linear.weight.detach(), linear.bias.detach())  # type: ignore[union-attr]  # fusable: it has one
        self.weight, self.transposed = self.matrix[:, :-1], self.matrix.t()
        weight, bias = masks.get(f"{name}.weight"), masks.get(f"{name}.bias")
        self._mask: Tensor | None = None
        if weight is not None or bias is not None:
            ones = torch.ones_like(self.matrix)
            weight = ones[:, :-1] if weight is None else weight.to(ones)
            self._mask = _joined(weight, ones[:, -1] if bias is None else bias.to(ones))
            self.matrix.mul_(self._mask)

    def step(self, g: Tensor, read: Tensor, scale: float) -> None:
        self.matrix.addmm_(g.t(), read, alpha=-scale)
        if self._mask is not None:
            self.matrix.mul_(self._mask)

    def state(self) -> dict[str, Tensor]:
        return {f"{self._name}.weight": self.weight, f"{self._name}.bias": self.matrix[:, -1]}


class _Hidden:
    """A hidden layer with its buffers; what the next one reads has a column of ones."""

    def __init__(self, layer: Layer, names: dict[int, str], masks: Masks, batch_size: int) -> None:
        self.dense = _Dense(layer.linear, layer.name, masks)
        whole, width = _buffer(self.dense.matrix, batch_size, _stride(layer.width + 1)), layer.width
        self.read, self._made = whole[:, : width + 1], whole[:, :width]
        self.read[:, -1] = 1
        # of the same layout, so that the gate runs over whole buffers; what is beside the nodes is never read
        self._gradient = torch.zeros_like(whole)
        self.gradient = self._gradient[:, :width]
        self._place = layer.norm_place
        self._norm = None
        if layer.norm is not None:
            self._norm = _Norm(layer.norm, names[id(layer.norm)], batch_size)
        self._rectified = whole if self._place != "after_relu" else torch.zeros_like(whole)
        self._linear = self._rectified[:, :width]  # before the ReLU, and after it

    def forward(self, h: Tensor) -> Tensor:
        torch.mm(h, self.dense.transposed, out=self._linear)
        if self._norm is not None and self._place == "before_relu":
            self._norm.forward(self._linear, self._made)
        self._rectified.relu_()
        if self._norm is not None and self._place == "after_relu":
            self._norm.forward(self._linear, self._made)
        return self.read

    def backward(self, scale: float) -> Tensor:
        if self._norm is not None and self._place == "after_relu":
            self._norm.backward(self.gradient, scale)
        torch.ops.aten.threshold_backward.grad_input(self._gradient, self._rectified, 0, grad_input=self._gradient)
        if self._norm is not None and self._place == "before_relu":
            self._norm.backward(self.gradient, scale)
        return self.gradient

    def state(self) -> dict[str, Tensor]:
        return self.dense.state() | (self._norm.state() if self._norm is not None else {})


class _Norm:
    """A BatchNorm1d that is training.

    Sums over the batch are products with a row of numbers. Mean and variance, over batch - 1 as torch keeps it, are
    one matrix, so that both running ones take their step at once.
    """

    def __init__(self, norm: BatchNorm, name: str, batch_size: int) -> None:
        self._name, self._size = name, batch_size
        self._momentum, self._unbiased = float(norm.momentum or 0.0), batch_size / (batch_size - 1)
        self._values = {key: value.detach().clone() for key, value in norm.state_dict().items()}
        self._weight, self._bias = self._values.get("weight"), self._values.get("bias")
        mean = self._values["running_mean"]
        self._running = torch.stack([mean, self._values["running_var"]])
        self._own, self._steps = torch.zeros_like(self._running), 0
        self._share, self._rest = (mean.new_full((batch_size,), 1 / n) for n in (batch_size, batch_size - 1))
        self._least = torch.full_like(mean, norm.eps)
        self._scaled, self._product = _buffer(mean, batch_size, len(mean)), _buffer(mean, batch_size, len(mean))
        self._factor = mean

    def forward(self, z: Float[Tensor, "batch nodes"], out: Float[Tensor, "batch nodes"]) -> None:
        mean, variance = self._own
        torch.mv(z.t(), self._share, out=mean)
        torch.sub(z, mean, out=self._scaled)
        torch.mul(self._scaled, self._scaled, out=self._product)
        torch.mv(self._product.t(), self._rest, out=variance)
        self._running.lerp_(self._own, self._momentum)
        self._steps += 1
        self._factor = torch.add(self._least, variance, alpha=1 / self._unbiased).rsqrt_()
        self._scaled.mul_(self._factor)
        if self._weight is None or self._bias is None:
            out.copy_(self._scaled)
        else:
            torch.addcmul(self._bias, self._scaled, self._weight, out=out)

    def backward(self, g: Float[Tensor, "batch nodes"], scale: float) -> None:
        """Turn ∂J/∂y into ∂J/∂z, in place: γ/σ·P⊥ of it, off the ones and off z; and take the step of γ and β."""
        torch.mul(g, self._scaled, out=self._product)
        of_bias, of_weight = torch.mv(g.t(), self._share), torch.mv(self._product.t(), self._share)
        g.sub_(of_bias).addcmul_(self._scaled, of_weight, value=-1).mul_(self._factor)
        if self._weight is not None and self._bias is not None:
            g.mul_(self._weight)
            self._weight.sub_(of_weight, alpha=scale * self._size)
            self._bias.sub_(of_bias, alpha=scale * self._size)

    def state(self) -> dict[str, Tensor]:
        mean, variance = self._running
        found = {"running_mean": mean, "running_var": variance}
        found["num_batches_tracked"] = self._values["num_batches_tracked"] + self._steps
        return {f"{self._name}.{key}": found.get(key, value) for key, value in self._values.items()}


def is_fusable(student: nn.Module) -> bool:
    """Tell whether `FusedStepper` can train a module: linear layers with biases, all trained, none of them tied.

    Args:
        student: the module.

    Example:
        >>> is_fusable(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1)))
        True
    """
    try:
        found = chain(student)
    except StructureError:
        return False
    count = sum(1 for _ in student.named_parameters(remove_duplicate=False))
    params = list(student.parameters())
    is_whole = count == len(params) and all(p.requires_grad for p in params)
    return is_whole and len({p.dtype for p in params}) == 1 and _has_own_layers(found)


# What a Linear with a bias has; of one that is pruned or normalised the weight is made anew on every run.
_OWN = {"weight", "bias"}


def _has_own_layers(found: Chain) -> bool:
    linears = [*(layer.linear for layer in found.layers), found.head]
    norms = [layer.norm for layer in found.layers if layer.norm is not None]
    return all(type(linear) is nn.Linear and set(linear._parameters) == _OWN for linear in linears) and all(
        type(norm) is nn.BatchNorm1d and norm.momentum is not None and norm.running_mean is not None for norm in norms
    )


def _joined(weight: Tensor, bias: Tensor) -> Tensor:
    rows, columns = weight.shape
    made = _buffer(weight, rows, _stride(columns + 1))[:, : columns + 1]
    made[:, :-1], made[:, -1] = weight, bias
    return made


def _stride(columns: int) -> int:
    """Give the numbers from row to row: a multiple of 16, of a cache line."""
    return -(-columns // 16) * 16


def _buffer(like: Tensor, *shape: int) -> Tensor:
    return torch.zeros(shape, dtype=like.dtype, device=like.device)
