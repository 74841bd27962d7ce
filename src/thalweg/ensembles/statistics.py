"""statistics: the running statistics of normalisation layers, taken anew from data."""

from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.func import functional_call

from thalweg.ensembles.members import large_batches
from thalweg.kernels import plain_kernels
from thalweg.objective import Objective
from thalweg.paths.pair import State
from thalweg.precision import copied

STATISTICS_SAMPLES = 2000
"""Samples that statistics are taken from, at least. Chosen by us, as for paths."""

_PARTS = ("running_mean", "running_var", "num_batches_tracked")


def layers_with_statistics(module: nn.Module) -> tuple[str, ...]:
    """List the layers of a module that keep running statistics."""
    return tuple(
        name
        for name, layer in module.named_modules()
        if isinstance(layer, nn.modules.batchnorm._NormBase)
        and layer.track_running_stats
        and layer.running_mean is not None
    )


def statistics_of(layer: str) -> tuple[str, ...]:
    """Name the buffers of a layer that keeps running statistics."""
    return tuple(f"{layer}.{part}" if layer else part for part in _PARTS)


def re_estimated(
    objective: Objective,
    state: State,
    layers: Collection[str] | None = None,
    count: int = STATISTICS_SAMPLES,
) -> dict[str, Tensor]:
    """Take the running statistics of a network anew: the mean over batches, weighted by their samples.

    Args:
        objective: the landscape, on the data.
        state: the network.
        layers: which of its layers. Default: all that keep statistics; the others keep theirs.
        count: samples to use, at least: the first ones.

    Returns:
        The state with the new statistics; as it was, if there is but one sample.

    **Source:** `update_bn` of Garipov et al. 2018 (arXiv 1802.10026), which uses all the training data.
    """
    chosen = layers_with_statistics(objective.module) if layers is None else tuple(layers)
    found = dict(state)
    if not chosen:
        return found
    module = copied(objective.module, device=objective.device).eval()
    norms = [layer for name, layer in module.named_modules() if name in chosen]
    for name in (part for layer in chosen for part in statistics_of(layer) if part in found):
        start = torch.ones_like if name.endswith("running_var") else torch.zeros_like
        found[name] = start(found[name])
    own = {name: tensor.clone() for name, tensor in found.items()}
    seen = 0.0
    for layer in norms:
        layer.train()
    with torch.no_grad(), plain_kernels():
        for weight, inputs in large_batches(objective):
            seen += weight
            for layer in norms:
                layer.momentum = weight / seen
            args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
            functional_call(module, own, args if isinstance(args, tuple) else (args,), kwargs)
            if seen >= count:
                break
    if not seen:  # a single sample has no statistics
        return dict(state)
    return found | {name: own[name] for layer in chosen for name in statistics_of(layer) if name in own}
