"""Several checkpoints of one network on the command line, on one landscape; and a checkpoint made of them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thalweg.cli.landscape import Landscape, objective_on
from thalweg.cli.network import Network, load_network, width_metadata
from thalweg.cli.parts import Value
from thalweg.cli.snapshots import example_from
from thalweg.errors import CheckpointError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from thalweg.ensembles import EnsembleScore
    from thalweg.objective import Objective
    from thalweg.paths.pair import State


@dataclass(frozen=True)
class Networks:
    """Checkpoints of one network, and the landscape that all are measured on.

    Args:
        files: where they lie.
        network: the module, as the first checkpoint has it.
        states: parameters and buffers of each.
        landscape: data and loss.
        train: the objective on the data.
        test: on test data; None without.
        built: model, net and arguments, as `load_network` takes them.
    """

    files: tuple[Path, ...]
    network: Network
    states: "tuple[State, ...]"
    landscape: Landscape
    train: "Objective"
    test: "Objective | None"
    built: Mapping[str, Any]

    def objectives(self) -> "list[tuple[str, Objective]]":
        """Give the objectives by name, "train" and, where there are test data, "test"."""
        return [("train", self.train), *([("test", self.test)] if self.test is not None else [])]


def load_networks(
    files: Sequence[Path], landscape: Landscape, built: Mapping[str, Any], options: Mapping[str, Any], device: str
) -> Networks:
    """Build the network from every checkpoint, and see that all fits together.

    Args:
        files: the checkpoints.
        landscape: data and loss.
        built: model, net and arguments, as `load_network` takes them.
        options: further options of `load_network`.
        device: where to compute.

    Returns:
        The networks.

    Raises:
        ThalwegError: a checkpoint, the data or the loss do not fit.
    """
    from thalweg.probes import examine

    loaded = []
    for file in files:
        network = _loaded(file, landscape, {**built, **options})
        own = [*network.module.named_parameters(), *network.module.named_buffers()]
        loaded.append((network, {name: tensor.detach().clone() for name, tensor in own}))
    network, state = loaded[0]
    network.module.load_state_dict(state, strict=False)  # --model may name one module, which all were read into
    dtype = _dtype(states := tuple(state for _, state in loaded))
    train = objective_on(landscape, network.module, dtype=dtype, device=device)
    test = None
    if landscape.test_data is not None:
        test = objective_on(landscape, network.module, is_test=True, dtype=dtype, device=device)
    for objective in filter(None, (train, test)):
        examine(objective, objective.theta())
    return Networks(tuple(files), network, states, landscape, train, test, built)


def _loaded(file: Path, landscape: Landscape, options: Mapping[str, Any]) -> Network:
    try:
        return load_network(file, shape=None, example=None, inputs=example_from(landscape), **options)
    except CheckpointError as error:
        if str(file) in str(error):
            raise
        raise CheckpointError(str(error).replace(". Got ", f". Got in {file}: ", 1)) from error


def _dtype(states: "Iterable[State]") -> "torch.dtype":
    """Give the widest type of all; half precision is measured in single."""
    import torch

    found = torch.float32
    for tensor in (t for state in states for t in state.values()):
        if tensor.is_floating_point():
            found = torch.promote_types(found, tensor.dtype)
    return found


def write_network(networks: Networks, state: "State", target: Path, source: str) -> dict[str, Value]:
    """Write a checkpoint that plain PyTorch loads, read it back, and measure what was read.

    Args:
        networks: the networks that it was made of.
        state: parameters and buffers.
        target: the file.
        source: what it was made of, for its metadata.

    Returns:
        Loss and accuracy by objective.

    Raises:
        CheckpointError: the file cannot be written.
    """
    from thalweg.checkpoint import save_state
    from thalweg.ensembles import evaluate, single
    from thalweg.ensembles.members import filled

    network = networks.network
    metadata = {"thalweg.source": source, **width_metadata(network.widths), **network.lift_metadata}
    save_state(target, filled(networks.network.module, state).state_dict(), metadata)
    again = load_network(target, **networks.built, shape=None, example=None, inputs=networks.network.inputs)
    own: Mapping[str, Tensor] = {**dict(again.module.named_parameters()), **dict(again.module.named_buffers())}
    return {name: values(evaluate(single(o, own), o)) for name, o in networks.objectives()}


def values(score: "EnsembleScore") -> Value:
    """Give loss and accuracy as plain values."""
    return {"loss": score.loss, "accuracy": score.accuracy}
