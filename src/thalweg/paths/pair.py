"""A pair: two trained points of one network, and what connecting them needs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from thalweg.batching import num_samples
from thalweg.errors import CheckpointError, DataError, ShapeError
from thalweg.objective import Objective
from thalweg.structure import View, trace
from thalweg.structure.sites import Execution, captured, execution

State = Mapping[str, Tensor]
"""Parameters and buffers by name."""

FIT_SAMPLES = 10_000
"""Samples that next layers are fitted on. Chosen by us: of 784-2000-10 on MNIST 1,500 samples suffice and 6,000 to
12,000 give the same accuracy; the paper takes all 60,000."""

_FIT_BYTES = 600 * 2**20
"""Bytes of the largest result of a linear map over the samples of a fit, which pass the network as one batch. Chosen
by us: a few such arrays at a time stay within 4 GB."""

_FEWEST = 64
"""Samples for fits at least. Chosen by us, where one sample alone is huge."""

_BATCH_NORM = nn.modules.batchnorm._NormBase


@dataclass(frozen=True)
class Pair:
    """Two points of one network, its landscape and its view.

    Args:
        objective: the landscape, on the data that fits are made on.
        view: groups of interchangeable units.
        a: parameters and buffers of the first network.
        b: those of the second.
        inputs: the samples that fits are made on, one batch.
        execution: the linear maps of the network, in order.
        sample_bytes: bytes of the results of all linear maps on one sample.
    """

    objective: Objective
    view: View
    a: State
    b: State
    inputs: Any
    execution: Execution
    sample_bytes: int = 1

    @classmethod
    def of(
        cls,
        objective: Objective,
        a: nn.Module | State,
        b: nn.Module | State,
        *,
        view: View | None = None,
        fit_samples: int = FIT_SAMPLES,
        seed: int = 0,
    ) -> "Pair":
        """Check two networks and find out what they are made of.

        Args:
            objective: the landscape, of a module of their architecture; its data serve for fits.
            a: the first network, or its state dict.
            b: the second.
            view: the groups. Default: traced on a few samples, and verified.
            fit_samples: samples for fits, at most; drawn at random from the data. Fewer where the feature maps of
                so many would take more than some GB.
            seed: of that draw.

        Returns:
            The pair.

        Raises:
            ShapeError: the networks differ in a name or a shape, or in a parameter that is not trained.
            CheckpointError: a weight is not finite.
            DataError: the data cannot be cut into samples.
        """
        states = [checked_state(objective, s, f"the {word} network") for s, word in ((a, "first"), (b, "second"))]
        for name, fixed in objective._constants.items():
            if not torch.equal(states[0][name], states[1][name]):
                raise ShapeError(
                    f"Expected networks that agree in what is not trained. Got {name!r}, which differs (of shape "
                    f"{tuple(fixed.shape)}). Set requires_grad=True if it is a coordinate."
                )
        few = first_samples(next(iter(objective.batches()))[0], 16)
        view = view or trace(objective.module, few)
        held = [g.name for g in view.groups if any(m.tensor in objective._constants for m in g.members)]
        view = view.without_groups(held) if held else view  # units that what is not trained makes or reads stay
        run = execution(objective.module, few).restricted(objective.space.names)
        sizes = _result_bytes(objective, run, few)
        count = min(fit_samples, max(_FIT_BYTES // max(sizes), _FEWEST))
        inputs = _fit_inputs(objective, count, seed)
        return cls(objective, view, states[0], states[1], inputs, run, sum(sizes))

    @property
    def joint_samples(self) -> int:
        """How many samples the results of all linear maps may be held of at once."""
        return max(2 * _FIT_BYTES // self.sample_bytes, _FEWEST)

    @property
    def theta_a(self) -> Float[Tensor, " params"]:
        """The first point."""
        return self.objective.space.theta(self.a)

    @property
    def theta_b(self) -> Float[Tensor, " params"]:
        """The second point."""
        return self.objective.space.theta(self.b)

    def trained(self, state: State) -> dict[str, Tensor]:
        """Keep the trainable parameters of a state."""
        return {name: state[name] for name in self.objective.space.names}

    def buffers(self, state: State) -> dict[str, Tensor]:
        """Keep the buffers of a state."""
        return {name: state[name] for name in self.objective._buffers if name in state}


def batch_statistics(module: nn.Module) -> nn.Module:
    """Copy a module so that layers with running statistics normalise by the batch; all else is in eval mode."""
    from thalweg.precision import copied

    device = next(p.device for p in module.parameters())
    twin = copied(module, device=device).eval()
    for part in twin.modules():
        if isinstance(part, _BATCH_NORM):
            part.train()
    return twin


def checked_state(objective: Objective, source: nn.Module | State, which: str) -> dict[str, Tensor]:
    """Complete and check the state of a network.

    Args:
        objective: the landscape of a module of its architecture.
        source: the network, or its state dict. Buffers that state dicts leave out are the objective's own.
        which: what to call it in messages.

    Returns:
        Every parameter and buffer of the module, on the device and in the dtypes of the objective.

    Raises:
        ShapeError: a name is missing or unknown, or a shape differs.
        CheckpointError: a weight is not finite.
    """
    if isinstance(source, nn.Module):
        source = {**dict(source.named_parameters()), **dict(source.named_buffers())}
    own = {**dict(objective.module.named_parameters()), **dict(objective.module.named_buffers())}
    stored = set(objective.module.state_dict(keep_vars=True))
    strangers = sorted(set(source) - stored - set(own))
    if strangers:
        raise ShapeError(
            f"Expected the names of the module in {which}. Got {', '.join(strangers[:3])} besides"
            f"{' and more' if len(strangers) > 3 else ''}. Take networks of one architecture."
        )
    state = {}
    for name, tensor in own.items():
        if name not in source and name not in stored:
            state[name] = tensor.detach().clone()
            continue
        value = source.get(name)
        if value is None or value.shape != tensor.shape:
            got = "none" if value is None else str(tuple(value.shape))
            raise ShapeError(
                f"Expected {name!r} of shape {tuple(tensor.shape)}. Got {got} in {which}. "
                "Take networks of one architecture."
            )
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise CheckpointError(
                f"Expected finite weights. Got NaN or infinity in {name!r} of {which}. Train it again."
            )
        state[name] = value.detach().to(device=tensor.device, dtype=tensor.dtype).clone()
    return state


def _fit_inputs(objective: Objective, count: int, seed: int) -> Any:
    total = objective.num_samples()
    if total is None:
        total = sum(num_samples(batch) for batch in objective.batches())
    if total < 1 or count < 1:
        raise DataError(f"Expected at least one sample to fit on. Got {min(total, count)}. Give more.")
    return next(iter(objective.sample(min(count, total), seed).batches()))[0]


def _result_bytes(objective: Objective, run: Execution, few: Any) -> list[int]:
    """Bytes of the result of each linear map, for each sample."""
    names = [site.weight for site in run.sites]
    state = {**dict(objective.module.named_parameters()), **dict(objective.module.named_buffers())}
    results = captured(objective.module, state, few, makes=names)[1].values()
    return [max(r.numel() * r.element_size() // max(len(r), 1), 1) for r in results] or [1]


def first_samples(inputs: Any, count: int) -> Any:
    """Take the first samples of a batch of inputs."""
    from torch.utils._pytree import tree_map_only

    return tree_map_only(Tensor, lambda t: t[:count] if t.ndim else t, inputs)
