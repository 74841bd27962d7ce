"""Lifted checkpoints on the command line: what they say of how they were made, and the module rebuilt from that."""

import glob
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thalweg.errors import CheckpointError, StructureError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from thalweg.lifting import LiftedLayer, Lifting, LiftPlan
    from thalweg.structure.trace import Inputs

LIFTED_KEY = "thalweg.lifted"
"""Metadata of a checkpoint that thalweg lifted, as JSON: per layer its kind and the size of its inputs; the shape of
one input of the net; whether padding is a layer of its own."""


@dataclass(frozen=True)
class Statement:
    """What a lifted checkpoint says of how it was made.

    Args:
        kinds: name of each lifted convolution -> "fc" or "local".
        sizes: name -> spatial size of what it is applied to, before padding.
        padded: whether dense maps keep the padding as a layer of its own.
        shape: of one input of the net, as --input takes it; None if the net takes more than one tensor.
    """

    kinds: Mapping[str, str]
    sizes: Mapping[str, tuple[int, ...]]
    padded: bool
    shape: str | None

    @classmethod
    def of(cls, plan: "LiftPlan", inputs: "Inputs", *, padded: bool) -> "Statement":
        """Say how a net is lifted.

        Args:
            plan: what is lifted.
            inputs: the example batch.
            padded: as it was asked for.
        """
        kinds = {layer.name: str(layer.kind) for layer in plan.layers}
        sizes = {layer.name: unpadded_size(layer) for layer in plan.layers}
        values = list(inputs)
        is_one = isinstance(inputs, tuple) and len(values) == 1 and hasattr(values[0], "shape")
        shape = "x".join(map(str, values[0].shape[1:])) if is_one else ""
        return cls(kinds, sizes, padded, shape or None)

    @classmethod
    def read(cls, metadata: Mapping[str, str]) -> "Statement | None":
        """Read what a checkpoint says; None if it was not lifted.

        Args:
            metadata: of the checkpoint.

        Raises:
            CheckpointError: it says that it was lifted, and not how.
        """
        if LIFTED_KEY not in metadata:
            return None
        try:
            found = json.loads(metadata[LIFTED_KEY])
            rows, padded, shape = found["layers"], found["padded"], found["input"]
            kinds = {str(name): row["kind"] for name, row in rows.items()}
            sizes = {str(name): tuple(int(n) for n in row["input_size"]) for name, row in rows.items()}
            is_right = isinstance(padded, bool) and set(kinds.values()) <= {"fc", "local"} and bool(kinds)
            is_right = is_right and isinstance(shape, str | None)
        except (ValueError, TypeError, AttributeError, KeyError):
            is_right = False
        if not is_right:
            raise CheckpointError(
                f"Expected metadata {LIFTED_KEY!r} as `thalweg lift` writes them. Got "
                f"{metadata[LIFTED_KEY][:80]!r}. Lift the convolutional checkpoint again."
            )
        return cls(kinds, sizes, padded, shape)

    def worded(self) -> str:
        """Give the metadata."""
        rows = {n: {"kind": kind, "input_size": list(self.sizes[n])} for n, kind in self.kinds.items()}
        return json.dumps({"layers": rows, "padded": self.padded, "input": self.shape})


@dataclass(frozen=True)
class Relaxed:
    """What a lifted module was made from.

    Args:
        origin: the convolutional module, with the weights that its factory gave it.
        lifting: the map from its parameters to those of the lifted module.
        statement: what the checkpoint says.
    """

    origin: "nn.Module"
    lifting: "Lifting"
    statement: Statement


def metadata_of(checkpoint: Path, *, trust_pickle: bool) -> dict[str, str]:
    """Read the metadata of a checkpoint; a pickle that needs code to be read has none that thalweg wrote.

    Raises:
        CheckpointError: it cannot be read.
    """
    from thalweg.checkpoint import load_metadata

    try:
        return load_metadata(checkpoint)
    except CheckpointError:
        if trust_pickle:
            return {}
        raise


def require_unlifted(checkpoint: Path, *, trust_pickle: bool) -> None:
    """See that a checkpoint is a convolutional one, before its module is built.

    Raises:
        CheckpointError: it is lifted, or cannot be read.
    """
    if Statement.read(metadata_of(checkpoint, trust_pickle=trust_pickle)) is not None:
        raise CheckpointError(
            f"Expected a checkpoint of a convolutional network. Got {checkpoint}, which is lifted already. Lift the "
            "one that it was made from, or bring it back by `thalweg lift --back`."
        )


def rebuilt(
    module: "nn.Module", inputs: "Inputs", statement: Statement, state: "Mapping[str, Tensor]"
) -> "tuple[nn.Module, Relaxed]":
    """Lift the module that a factory made as a checkpoint says, and fill it; shapes are compared before.

    Beside the state there is one copy of the lifted weights.

    Args:
        module: the convolutional one.
        inputs: an example batch.
        statement: what the checkpoint says.
        state: its tensors.

    Returns:
        The lifted module with the state, in eval mode, and where it comes from.

    Raises:
        CheckpointError: the checkpoint does not fit the module or the inputs.
        MemoryLimitError: it does not fit into memory.
    """
    import torch

    from thalweg.checkpoint import load_into
    from thalweg.lifting import Lifting
    from thalweg.lifting.lift import build_lifted, require_memory
    from thalweg.lifting.memory import available_memory

    plan = _plan(module, inputs, statement)
    _require_fit(plan, statement, state)
    require_memory(plan, available_memory(torch.device("cpu")))
    result, lifting = build_lifted(module, plan)
    load_into(result.eval(), state)
    # Taps that read nothing but padding have no value in the file; those of the factory mean nothing.
    lifting = Lifting(lifting.layers, lifting.space, lifting.lifted_space)
    return result, Relaxed(module, lifting, statement)


def _plan(module: "nn.Module", inputs: "Inputs", statement: Statement) -> "LiftPlan":
    from thalweg.lifting import lift_plan

    chosen: dict[str, Any] = {glob.escape(name): kind for name, kind in statement.kinds.items()}
    try:
        return lift_plan(module, inputs, to=chosen, padded=statement.padded)
    except StructureError as error:
        raise CheckpointError(
            f"{error} The checkpoint is lifted: give what builds the convolutional module that it was made from."
        ) from error


def _require_fit(plan: "LiftPlan", statement: Statement, state: "Mapping[str, Tensor]") -> None:
    for layer in plan.layers:
        size, stated = unpadded_size(layer), statement.sizes.get(layer.name)
        if size != stated:
            hint = f"--input {statement.shape}" if statement.shape else "them by --example"
            raise CheckpointError(
                f"Expected inputs of spatial size {_times(stated or ())} at {layer.name!r}, which was lifted for "
                f"these alone. Got {_times(size)}. Give {hint}, or data of that size."
            )
        name = ".".join(filter(None, (layer.name, f"{layer.inner}weight")))
        if name in state and tuple(state[name].shape) != layer.weight_shape:
            raise CheckpointError(
                f"Expected {name!r} of shape {layer.weight_shape}. Got {tuple(state[name].shape)}. Build the module "
                "with the widths that it was lifted with: --arg key=value."
            )


def unpadded_size(layer: "LiftedLayer") -> tuple[int, ...]:
    """Give the spatial size of what a convolution is applied to.

    Args:
        layer: the convolution.
    """
    widths = layer.padding[1] if layer.padding is not None else (0,) * 2 * len(layer.geometry.input_size)
    pads = [widths[n] + widths[n + 1] for n in range(0, len(widths), 2)][::-1]  # the last dim stands first
    return tuple(n - pad for n, pad in zip(layer.geometry.input_size, pads, strict=True))


def _times(sizes: tuple[int, ...]) -> str:
    return "×".join(map(str, sizes))
