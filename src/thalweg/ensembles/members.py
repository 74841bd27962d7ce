"""Members: several trained networks of one architecture as complete states, and the samples for fits."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from thalweg.batching import Batch, joined, num_samples, pieces
from thalweg.errors import ConfigError, DataError
from thalweg.objective import Objective
from thalweg.paths.pair import State, checked_state
from thalweg.precision import copied

_PIECE = 1000
"""Samples of a fit that pass the network at once. Chosen by us: their feature maps take about a GB at most."""

_FEWEST = 32
"""Samples of a batch from which statistics are taken. Chosen by us: with fewer, noise adds up layer by layer."""

_EXAMPLE = 16
"""Samples that a network is run on to see what it is made of. Chosen by us."""


def settled(objective: Objective, sources: Sequence[nn.Module | State], *, least: int = 1) -> list[dict[str, Tensor]]:
    """Complete and check the states of several networks.

    Args:
        objective: the landscape of a module of their architecture.
        sources: modules, or state dicts.
        least: how many there must be.

    Returns:
        One state for each, on the device and in the dtype of the objective.

    Raises:
        ConfigError: there are fewer networks.
        ShapeError: a network differs in a name or a shape.
        CheckpointError: a weight is not finite.
    """
    if len(sources) < least:
        raise ConfigError(f"Expected {least} networks or more. Got {len(sources)}. Name them.")
    return [checked_state(objective, source, f"network {place}") for place, source in enumerate(sources, 1)]


def example_of(objective: Objective) -> tuple[Any, Any]:
    """Give a few samples of the data: inputs and targets."""
    batch = next(iter(objective.batches()))
    inputs, targets = tree_map_only(Tensor, lambda t: t[:_EXAMPLE] if t.ndim else t, tuple(batch))
    return inputs, targets


def fit_inputs(objective: Objective, count: int, seed: int) -> list[Any]:
    """Draw samples for fits, in batches; of data that only come batch by batch, take the first ones.

    Args:
        objective: the landscape, on the data.
        count: how many, at most.
        seed: of the draw.

    Returns:
        Batches of inputs.

    Raises:
        DataError: no samples are wanted.
    """
    if count < 1:
        raise DataError(f"Expected at least one sample to fit on. Got {count}. Ask for more.")
    total = objective.num_samples()
    if total is not None:
        whole = next(iter(objective.sample(min(count, total), seed).batches()))
        return [piece[0] for piece in pieces(whole, _PIECE)]
    taken, seen = [], 0.0
    for weight, inputs in large_batches(objective):
        taken.append(inputs)
        seen += weight
        if seen >= count:
            break
    return taken


def large_batches(objective: Objective) -> Iterator[tuple[float, Any]]:
    """Give the inputs batch by batch, with their samples; batches too small for statistics are joined.

    Args:
        objective: the landscape, on the data.

    Yields:
        How many samples, and the inputs. One sample that is left over at the end is dropped.
    """
    waiting, count = list[Batch](), 0
    for batch in objective.batches():
        try:
            count += num_samples(batch)
        except DataError:  # a batch that is not one row per sample
            yield 1.0, batch[0]
            continue
        waiting.append(batch)
        if count >= _FEWEST:
            yield float(count), joined(waiting)[0]
            waiting, count = [], 0
    if count > 1:
        yield float(count), joined(waiting)[0]


def filled(module: nn.Module, state: State) -> nn.Module:
    """Copy a module and give the copy a state; ties between parameters are kept.

    Args:
        module: not changed.
        state: parameters and buffers by name.

    Returns:
        The copy, in eval mode, in the dtypes of the module.
    """
    twin = copied(module, device=next(module.parameters()).device).eval()
    with torch.no_grad():
        for name, tensor in (*twin.named_parameters(), *twin.named_buffers()):
            if name in state:
                tensor.copy_(state[name])
    return twin
