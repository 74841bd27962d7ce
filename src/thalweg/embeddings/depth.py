"""Lift to a deeper network: a layer that acts as the identity on the data, exactly where an activation is affine."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from thalweg.embeddings.depth_layers import (
    Affine,
    Expansion,
    Span,
    activation_of,
    affine_range,
    along_inputs,
    backed,
    expand,
    fill,
    inserted_layer,
    require_affine_layer,
    require_inert,
    tolerance_of,
    without_padding,
)
from thalweg.errors import ConfigError, NumericalError, StructureError
from thalweg.precision import copied
from thalweg.space import Space
from thalweg.structure.comparison import placed_for
from thalweg.structure.trace import Inputs, call, output_tensors

_SHRINK = 0.25
"""By how much ε falls from one trial to the next, chosen by us: a power of two, so that scaling by it is exact."""


@dataclass(frozen=True, eq=False)
class Deepened:
    """A network with one more layer that computes the same on the data.

    Args:
        module: the deeper module; in place of the layer stands `nn.Sequential(new, activation, old)`, so that names
            of parameters become `layer.0.weight`, `layer.2.weight` and so on.
        reference: the module before, as a copy; with a bias of zeros in the layer if it had none and one is needed.
        layer: dotted name of the layer.
        error: max|f_deep - f| / max|f| on the inputs, in the module's own precision.
        expansion: ε, shift, values and slopes of the activation, one for each unit.
        added_bias: the layer had no bias and was given one; a critical point of the user's module stays critical
            only if ∂R/∂b of that bias, the sum of the layer's errors, vanishes there.
    """

    module: nn.Module
    reference: nn.Module
    layer: str
    error: float
    expansion: Expansion
    added_bias: bool

    @property
    def is_exact(self) -> bool:
        """The activation is affine on the data, to rounding: outputs, gradients and critical points are exact."""
        return self.expansion.is_affine

    def gradient(self, gradient: Float[Tensor, " narrow"]) -> Float[Tensor, " deep"]:
        """Predict ∇R at the deeper point from ∇R of `reference`: exact at every point where `is_exact`.

        With V and d the weight and bias of the new layer, h ↦ σ(V h + d) = values + ε slopes · h:

            ∂R/∂V = Wᵀ ∂R/∂W / ε,    ∂R/∂d = Wᵀ ∂R/∂b / ε,    ∂R/∂b' = ∂R/∂b,
            ∂R/∂W' = ε slopes · ∂R/∂W + ∂R/∂b valuesᵀ,

        all others unchanged; of a convolution, W and ∂R/∂W are summed over outputs and kernel within a group.

        Args:
            gradient: ∇R over the coordinates of `reference` (those of the user's module, if it had a bias).

        Returns:
            ∇R over the coordinates of `module`.

        Raises:
            ShapeError: the gradient does not fit `reference`.
        """
        parts, deep, prefix = Space.of(self.reference).parameters(gradient), Space.of(self.module), self._prefix
        own = {f"{prefix}weight", f"{prefix}bias"}
        result = {(f"{prefix}2.{n[len(prefix) :]}" if n in own else n): t for n, t in parts.items()}
        if (slope := parts.get(f"{prefix}weight")) is not None:
            layer, x = self._layer, self.expansion
            mixed, weight = backed(layer, slope)
            shape = self.module.get_parameter(f"{prefix}0.weight").shape
            result[f"{prefix}0.weight"] = mixed.reshape(shape) / x.epsilon
            result[f"{prefix}2.weight"] = slope * along_inputs(x.epsilon * x.slopes, layer)
            if (errors := parts.get(f"{prefix}bias")) is not None:
                grouped = errors.reshape(weight.shape[0], -1)
                result[f"{prefix}0.bias"] = torch.einsum("goi,go->gi", weight, grouped).flatten() / x.epsilon
                constant = errors.reshape([-1] + [1] * (slope.ndim - 1)) * along_inputs(x.values, layer)
                result[f"{prefix}2.weight"] = result[f"{prefix}2.weight"] + constant
        for name, size in zip(deep.names, deep.shapes, strict=True):
            if name.startswith(f"{prefix}1."):  # on an affine range nothing depends on the activation's parameters
                result[name] = gradient.new_zeros(size)
        return deep.theta(result)

    @property
    def _prefix(self) -> str:
        return f"{self.layer}." if self.layer else ""

    @property
    def _layer(self) -> Affine:
        return require_affine_layer(self.reference.get_submodule(self.layer), self.layer)


def deepen(
    module: nn.Module,
    inputs: Any,
    layer: str,
    *,
    activation: str | nn.Module = "relu",
    tolerance: float | None = None,
    centre: float | None = None,
    margin: float = 1.0,
) -> Deepened:
    """Put a layer and an activation in front of a layer, so that the network computes the same on the data.

    The new layer is ε times the identity plus a shift (a 1×1 convolution in front of a convolution; it takes over
    the padding, so that padded places are shifted like the others), and the old layer undoes what the activation
    makes of it. Where the activation is affine on the shifted data, the lift is exact and critical points stay
    critical: ReLU, leaky ReLU, ELU with every unit shifted to where it is positive; GELU, SiLU, softplus shifted
    further, to where they are their argument to the last bit. tanh, sigmoid and others are used in a small range
    ε h about `centre`, where they are affine to second order if σ'' = 0 there, to first order otherwise; the
    largest ε within the tolerance is taken, to a factor of 4. The gradient at a critical point is then of order ε if
    σ'' = 0 at the centre (the outputs of order ε²) and does not vanish with ε otherwise. What the gradient becomes
    at any point is `Deepened.gradient`.

    A layer without a bias stays without one where its inputs are positive on all data (ReLU-like), or where
    σ(centre) = centre = 0 (tanh). Otherwise it is given one.

    Source:
        bai2022depth (arXiv 2205.13283), one-layer lifting on an affine subdomain of the activation. Departures:
        the identity is the only lift that is built; convolutions; activations that are affine to rounding far
        out; a linear range where they are affine nowhere, which is not exact.

    Args:
        module: any `nn.Module`; it is not touched.
        inputs: the data on which the lift is to hold: a tensor, a tuple of arguments, or a dict of keyword
            arguments.
        layer: dotted name of an `nn.Linear` or `nn.Conv1d`, `2d`, `3d`; "" if the module is that layer itself.
        activation: "relu" (default: exact), "leaky_relu", "elu", "gelu", "silu", "softplus", "tanh", "sigmoid", or
            a module that acts on each entry by itself.
        tolerance: relative change of the outputs to allow. Default √eps of the module's type (1.5e-8 in float64):
            where σ'' = 0, truncation ε² against rounding eps/ε reaches eps^(2/3), so that this is met with room;
            less makes ε smaller, and weights 1/ε and gradients 1/ε larger.
        centre: expand there, whether or not the activation is affine elsewhere. Default: where it is affine, else
            0, where tanh and sigmoid have no curvature; GELU has none at √2, SiLU at 2.3994.
        margin: how far the data stay from the end of an affine part, in units of each input's largest value.
            Default 1, our choice: other data of the size of these are within it too.

    Returns:
        The deeper module, with the error reached, and the gradient to expect.

    Raises:
        StructureError: no such layer or not of a kind that can be deepened; its weight is tied; the module does
            not run it, or not when it is a sequence of layers, or gives no real numbers to compare; the activation
            has trainable parameters that matter.
        ConfigError: an unknown activation, one without slope at `centre`, or a tolerance or margin that is not
            positive.
        NumericalError: the layer's inputs are not finite, or the tolerance is beyond what rounding leaves.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
        >>> deeper = deepen(net, torch.randn(5, 2), "2")
        >>> [type(m).__name__ for m in deeper.module[2]], deeper.is_exact
        (['Linear', 'ReLU', 'Linear'], True)
    """
    reference = copied(module, device=next(module.parameters(), torch.zeros(0)).device)
    name, target = _target(reference, layer)
    tolerance = tolerance_of(target.weight.dtype) if tolerance is None else tolerance
    if not (tolerance > 0 and margin > 0):
        raise ConfigError(f"Expected a positive tolerance and margin. Got {tolerance} and {margin}. Raise them.")
    sigma, arguments = activation_of(activation, target.weight), placed_for(reference, inputs)
    span, outputs = _measured(reference, name, target, arguments)
    is_padded = not isinstance(target, nn.Linear) and target.padding_mode == "zeros"
    trials = _trials(sigma, span, centre, margin, has_bias=target.bias is not None, is_padded=is_padded)
    added_bias = target.bias is None and trials[0].needs_bias
    if added_bias:
        zeros = target.weight.new_zeros(len(target.weight))
        target.bias = nn.Parameter(zeros, requires_grad=target.weight.requires_grad)
    deep, new, old = _inserted(copied(reference, device=target.weight.device), name, sigma)
    reached: dict[float, float] = {}
    for trial in trials:
        fill(new, old, target, trial)
        reached[trial.epsilon] = _change(deep, name, arguments, outputs)
        if reached[trial.epsilon] <= tolerance:
            require_inert(sigma, span, trial)
            return Deepened(deep, reference, name, reached[trial.epsilon], trial, added_bias)
    best = min(reached, key=lambda e: reached[e])
    raise NumericalError(
        f"Expected the outputs within a relative change of {tolerance:.1e}. Got {reached[best]:.1e} at best, with "
        f"ε = {best:.1e}: truncation falls with ε, rounding rises. Allow more, expand at a centre without curvature, "
        "or use an activation with an affine part such as 'relu'."
    )


def _target(module: nn.Module, layer: str) -> tuple[str, Affine]:
    """Find a layer, and the first of its names."""
    places = dict(module.named_modules(remove_duplicate=False))
    if layer not in places:
        kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
        found = [repr(n) for n, m in module.named_modules() if type(m) in kinds]
        raise StructureError(f"Expected a layer among {', '.join(found) or 'none'}. Got {layer!r}. Choose one.")
    target = require_affine_layer(places[layer], layer)
    names = [n for n, m in places.items() if m is target]
    own = {f"{n}.{leaf}" if n else leaf for n in names for leaf in ("weight", "bias")}
    tied = [
        n
        for n, p in module.named_parameters(remove_duplicate=False)
        if (p is target.weight or p is target.bias) and n not in own
    ]
    if tied:
        raise StructureError(
            f"Expected a layer with a weight of its own. Got {layer!r}, whose weight is {tied[0]!r} too. "
            "Deepen another layer, or untie it."
        )
    return names[0], target


def _measured(module: nn.Module, name: str, target: Affine, arguments: Inputs) -> tuple[Span, list[Tensor]]:
    """Run the module in eval mode; give the range of every input unit of a layer, and the outputs."""
    lows: list[Tensor] = []
    highs: list[Tensor] = []
    dim = -1 if isinstance(target, nn.Linear) else -1 - len(target.kernel_size)

    def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rows = (args[0] if args else kwargs["input"]).detach().movedim(dim, -1).flatten(0, -2)
        if len(rows):
            lows.append(rows.amin(dim=0))
            highs.append(rows.amax(dim=0))

    handle = target.register_forward_pre_hook(look, with_kwargs=True)
    try:
        outputs = _outputs(module, arguments)
    finally:
        handle.remove()
    if not lows:
        raise StructureError(
            f"Expected the module to run {name!r} on these inputs. Got no call. Choose another layer."
        )
    span = Span(torch.stack(lows).amin(dim=0), torch.stack(highs).amax(dim=0))
    if not bool(torch.isfinite(span.high - span.low).all()):
        raise NumericalError(f"Expected finite inputs of {name!r}. Got NaN or infinity. Check the data.")
    if not outputs:
        raise StructureError(
            "Expected outputs of real numbers to compare. Got none. Pass a module that returns what its answer is "
            "taken from, such as logits in place of their argmax."
        )
    return span, outputs


def _trials(
    sigma: nn.Module, span: Span, centre: float | None, margin: float, *, has_bias: bool, is_padded: bool
) -> list[Expansion]:
    """Expand the activation where it is affine; else about a centre, in ever smaller ranges."""
    if centre is None:
        found = affine_range(sigma, span, margin, has_bias=has_bias, is_padded=is_padded)
        if found is not None:
            return [found]
    shift = torch.full_like(span.low, centre or 0.0)
    largest = float(span.size.max())
    first = 2.0 ** math.floor(math.log2(1 / largest))
    count = math.ceil(math.log(torch.finfo(shift.dtype).eps) / math.log(_SHRINK))
    trials = [expand(sigma, span, shift, first * _SHRINK**k, is_padded=is_padded) for k in range(count)]
    if not bool((trials[0].slopes != 0).all()):
        raise ConfigError(
            f"Expected an activation with a slope at {centre or 0.0}. Got slope 0 of {type(sigma).__name__}. "
            "Choose another centre."
        )
    return trials


def _inserted(module: nn.Module, name: str, sigma: nn.Module) -> tuple[nn.Module, Affine, Affine]:
    """Put a new layer and an activation in front of a layer, wherever it stands."""
    target = require_affine_layer(module.get_submodule(name), name)
    new = inserted_layer(target, name, bias=target.bias is not None)
    both = nn.Sequential(new, sigma, target).train(target.training)
    without_padding(target)
    if target is module:
        return both, new, target
    for parent in list(module.modules()):
        for leaf in [n for n, child in parent._modules.items() if child is target]:
            setattr(parent, leaf, both)
    return module, new, target


def _outputs(module: nn.Module, arguments: Inputs) -> list[Tensor]:
    """Run a module in eval mode, and leave it in the mode in which it was."""
    modes = [(m, m.training) for m in module.modules()]
    try:
        with torch.no_grad():
            return [t for t in output_tensors(call(module.eval(), arguments)) if t.is_floating_point() and t.numel()]
    finally:
        for part, mode in modes:
            part.training = mode


def _change(module: nn.Module, name: str, arguments: Inputs, before: list[Tensor]) -> float:
    """Give max|f_deep - f| / max|f|; a NaN counts as infinite."""
    try:
        after = _outputs(module, arguments)
    except Exception as error:  # whatever a user's forward raises
        raise StructureError(
            f"Expected the module to run with a sequence in place of {name!r}. Got {type(error).__name__}: {error}. "
            "Its code reads the layer's attributes: deepen another layer."
        ) from error
    errors = [float((a - b).abs().max()) / (float(b.abs().max()) or 1.0) for a, b in zip(after, before, strict=True)]
    return max(e if math.isfinite(e) else math.inf for e in errors)
