"""Whether two modules compute the same on an example batch."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from thalweg.errors import StructureError
from thalweg.structure.trace import Inputs, arguments_of, call, output_tensors


def placed_for(module: nn.Module, inputs: Any) -> Inputs:
    """Give an example batch as arguments on a module's device, in its dtype.

    Args:
        module: with at least one parameter.
        inputs: a tensor, a tuple of arguments, or a dict of keyword arguments.

    Returns:
        A tuple of arguments, or a dict of keyword arguments.
    """
    place = next(module.parameters())
    placed: Inputs = tree_map_only(
        Tensor,
        lambda t: t.to(place.device, place.dtype) if t.is_floating_point() else t.to(place.device),
        arguments_of(inputs),
    )
    return placed


def output_change(result: nn.Module, module: nn.Module, inputs: Any, what: str = "resized") -> float:
    """Give max|f_result - f| / max|f| on an example batch, both in eval mode.

    Args:
        result: what was made of a module: wider, narrower, lifted.
        module: the module; both stay in the modes in which they are.
        inputs: a tensor, a tuple of arguments, or a dict of keyword arguments.
        what: what the result is, for the message.

    Returns:
        The relative change; infinity if the outputs are of another shape, NaN if an output is.

    Raises:
        StructureError: the result does not run.
    """
    arguments = placed_for(module, inputs)
    modes = [(m, m.training) for m in (*result.modules(), *module.modules())]
    try:
        with torch.no_grad():
            theirs = _tensors(call(module.eval(), arguments))
            try:
                mine = _tensors(call(result.eval(), arguments))
            except StructureError:
                raise
            except Exception as error:  # whatever a user's forward raises
                raise StructureError(
                    f"Expected the {what} module to run. Got {type(error).__name__}: {error}. "
                    "Its code fixes a size, or looks into a layer: pass your own module, or keep that layer."
                ) from error
    finally:
        for layer, mode in modes:
            layer.training = mode
    if [t.shape for t in mine] != [t.shape for t in theirs]:
        return float("inf")
    errors = [float((a - b).abs().max()) / (float(b.abs().max()) or 1.0) for a, b in zip(mine, theirs, strict=True)]
    return float(np.max(errors, initial=0.0))  # a NaN stays one


def _tensors(outputs: Any) -> list[Tensor]:
    return [t.to(torch.float64) for t in output_tensors(outputs) if t.numel()]
