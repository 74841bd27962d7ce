"""A map of units: an invertible network ν between the units of trained nets and a space where arcs are run along."""

import copy
import functools
import json
import math
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path as File
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from thalweg.checkpoint import load_metadata, load_state, save_state
from thalweg.errors import CheckpointError, ConfigError, ShapeError

FlowKind = Literal["realnvp", "iaf"]

_KEY = "thalweg unit map"
_LEAST_STD = 1e-6
"""Least standard deviation of a feature, over the largest. Chosen by us: a feature that never varies stays put."""
_LOG_SCALE = 1.0
"""Bound of the log-scale of each transform, approached smoothly. That of the authors' IAF; for RealNVP, whose own is
unbounded, it keeps the round trip within the precision of float32."""


@dataclass(frozen=True)
class FlowShape:
    """What the network ν is made of.

    Args:
        kind: "realnvp" (affine couplings) or "iaf" (masked affine autoregressive).
        features: of a unit.
        transforms: how many, one after another.
        hidden: widths of the hidden layers of the network in each.
        passes: for "iaf": sequential passes of the inverse, of at most `features`.
    """

    kind: FlowKind
    features: int
    transforms: int
    hidden: tuple[int, ...]
    passes: int = 8

    def __post_init__(self) -> None:
        sizes = (self.transforms, self.passes, *self.hidden)
        if self.kind not in ("realnvp", "iaf") or not self.hidden or min(sizes) < 1 or self.features < 2:
            raise ConfigError(
                "Expected kind 'realnvp' or 'iaf', units of 2 or more features, and positive sizes. "
                f"Got {self}. The defaults are those of the paper."
            )

    def network(self) -> nn.Module:
        """Build ν as a zuko transform that is the identity, with weights drawn from torch's own generator."""
        flows, transforms = _zuko()
        univariate = functools.partial(transforms.MonotonicAffineTransform, slope=math.exp(-_LOG_SCALE))
        options: dict[str, Any] = {"hidden_features": self.hidden, "activation": nn.Tanh, "univariate": univariate}
        if self.kind == "iaf":
            flow = flows.MAF(self.features, transforms=self.transforms, passes=self.passes, **options)
        else:
            flow = flows.RealNVP(self.features, transforms=self.transforms, **options)
        for transform in flow.transform.transforms:
            for parameter in transform.hyper[-1].parameters():
                nn.init.zeros_(parameter)
        network: nn.Module = flow.transform
        return network


@dataclass(frozen=True)
class UnitMap:
    """ν of a standardised unit, and back: a path between nets that it never saw is one formula.

    Args:
        group: name of the group whose units it maps.
        mean: of each feature over the units that it was fitted on.
        std: standard deviation of each.
        shape: what the network is made of.
        network: ν itself, a zuko transform.
        losses: validated losses, the first that of the identity (Arc).
        status: "finished", or "diverged": then ν is the best before.
    """

    group: str
    mean: Float[Tensor, " features"]
    std: Float[Tensor, " features"]
    shape: FlowShape
    network: nn.Module = field(repr=False)
    losses: tuple[float, ...] = ()
    status: Literal["new", "finished", "diverged"] = "new"

    def latent(self, rows: Float[Tensor, "units features"]) -> Float[Tensor, "units features"]:
        """Compute ν(X), differentiable.

        Raises:
            ShapeError: units of another number of features.
        """
        if rows.shape[-1] != self.shape.features:
            raise ShapeError(
                f"Expected units of {self.shape.features} features. Got {rows.shape[-1]}. "
                "Use the map on nets of the architecture that it was fitted on."
            )
        result: Tensor = self.network()((rows.to(self.mean) - self.mean) / self.std)
        return result

    def units(self, latent: Float[Tensor, "units features"]) -> Float[Tensor, "units features"]:
        """Compute ν⁻¹, differentiable."""
        result: Tensor = self.mean + self.std * self.network().inv(latent)
        return result

    def between(
        self, start: Float[Tensor, "units features"], end: Float[Tensor, "units features"], s: float
    ) -> Float[Tensor, "units features"]:
        """Give the units at s: ν⁻¹[cos(πs/2)·start + sin(πs/2)·end], of ends that are ν(X) and ν(Y)."""
        return self.units(math.cos(math.pi * s / 2) * start + math.sin(math.pi * s / 2) * end)

    def round_trip(self, rows: Float[Tensor, "units features"]) -> float:
        """Measure max |ν⁻¹(ν(X)) - X| over the units, in standard deviations of each feature."""
        with torch.no_grad():
            off = (self.units(self.latent(rows)) - rows.to(self.mean)).abs() / self.std
        return float(off.max())

    def to(self, dtype: torch.dtype, device: torch.device | str | None = None) -> "UnitMap":
        """Copy the map into another floating type, or onto a device."""
        device = device or self.mean.device
        network = copy.deepcopy(self.network).to(device=device, dtype=dtype)
        return replace(self, mean=self.mean.to(device, dtype), std=self.std.to(device, dtype), network=network)

    def save(self, path: str | File) -> None:
        """Write the map as a safetensors checkpoint; `UnitMap.load` reads it.

        Raises:
            CheckpointError: an unknown suffix, or a place that cannot be written.
        """
        state = {f"network.{name}": value for name, value in self.network.state_dict().items()}
        shape = {**vars(self.shape), "hidden": list(self.shape.hidden)}
        record = {"group": self.group, "shape": shape, "losses": list(self.losses), "status": self.status}
        save_state(path, {**state, "mean": self.mean, "std": self.std}, {_KEY: json.dumps(record)})

    @classmethod
    def load(cls, path: str | File) -> "UnitMap":
        """Read a map that `save` wrote.

        Raises:
            CheckpointError: the file is missing or damaged, or is no map of units.
            ConfigError: zuko is not installed.
        """
        try:
            record = json.loads(load_metadata(path)[_KEY])
            shape = FlowShape(**{**record["shape"], "hidden": tuple(record["shape"]["hidden"])})
            state = load_state(path)
            mean, std = state.pop("mean"), state.pop("std")
            with torch.random.fork_rng(devices=[]):
                network = shape.network().to(mean)
            network.load_state_dict({n.removeprefix("network."): v for n, v in state.items()})
            return cls(record["group"], mean, std, shape, network, tuple(record["losses"]), record["status"])
        except (KeyError, TypeError, json.JSONDecodeError, RuntimeError) as error:
            raise CheckpointError(
                f"Expected a map of units as UnitMap.save writes it. Got {path} ({type(error).__name__}). "
                "Fit one and save it."
            ) from error


def identity_map(
    group: str,
    rows: Float[Tensor, "units features"],
    *,
    generator: torch.Generator,
    kind: FlowKind = "realnvp",
    transforms: int = 2,
    hidden: tuple[int, ...] | None = None,
    passes: int = 8,
    dtype: torch.dtype = torch.float32,
) -> UnitMap:
    """Start a map of units as the identity: its path is Arc about the mean of all units that are given.

    Args:
        group: whose units.
        rows: units of many trained nets, as `unit_rows` gives butterflies.
        generator: of the weights that lie under the last layers, which are zero.
        kind: "realnvp" or "iaf".
        transforms: couplings or autoregressive layers. Default: Table 1 of the paper, as its code has it.
        hidden: widths of the networks in them. Default: two hidden layers, of 2 widths of the unit for RealNVP
            (the paper: 2,000 for 795) and of one for IAF.
        passes: for "iaf": passes of the inverse. The paper's is fully autoregressive (one for each feature, 795
            at each point of the path); 8 are chosen by us, so that a point costs four times RealNVP's.
        dtype: of the map.

    Returns:
        The map.

    Raises:
        ConfigError: zuko is not installed, an unknown kind, or sizes that are not positive.

    **Source:** Anokhin & Yarotsky 2020 (arXiv 2008.00741), section 3.3; RealNVP: Dinh et al. 2016
    (arXiv 1605.08803). "iaf" is parallel from units to the latent space, as maximum likelihood needs and as the
    authors' code has it. Departures: identity at the start, units standardised, bounded log-scales, tanh
    without BatchNorm.

    Example:
        >>> rows = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
        >>> start = identity_map("hidden", rows, generator=torch.Generator().manual_seed(1))
        >>> start.round_trip(rows) < 1e-5
        True
    """
    features = rows.shape[-1]
    widths = hidden or ((2 if kind == "realnvp" else 1) * features,) * 2
    shape = FlowShape(kind, features, transforms, tuple(widths), passes)
    values = rows.detach().double()
    std = values.std(0, correction=0)
    std = std.clamp(min=max(_LEAST_STD * float(std.max()), torch.finfo(dtype).tiny))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        network = shape.network().to(device=rows.device, dtype=dtype)
    return UnitMap(group, values.mean(0).to(dtype), std.to(dtype), shape, network)


def _zuko() -> tuple[Any, Any]:
    try:
        return import_module("zuko.flows"), import_module("zuko.transforms")
    except ModuleNotFoundError as error:
        raise ConfigError(
            "Expected zuko for maps of units. Got no such package. Install it: pip install thalweg[flows]."
        ) from error
