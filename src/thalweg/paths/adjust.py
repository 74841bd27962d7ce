"""Weight adjustment: in one forward pass, the layers that read what has moved are fitted anew by least squares."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from thalweg.matching.refit import Fit, refit
from thalweg.paths.pair import Pair, State, batch_statistics
from thalweg.structure.sites import SiteCall, captured, run_with

RIDGE = 1e-4
"""Ridge of the prior-centred fit, times the mean of the Gram matrix's diagonal. Chosen by us: it removes the collapse
where samples are about as many as features (36 % to 98 % accuracy) and costs nothing elsewhere."""


@dataclass
class Adjuster:
    """Fits layers of a pair's network on its fit samples.

    Layers with running statistics normalise by the batch, here as along the path.

    Args:
        pair: the networks and the samples.
        ridge: 0 for the paper's least squares, of least norm where it is not unique; else the prior-centred ridge.
        inputs: the samples, one batch. Default: the pair's.
        fits: what was fitted, in order, for the record.
        growth: weight -> the largest norm of a fit, over the norm of the weight before.
        jumps: weight -> the largest change between two neighbouring fits of a stage, over the norm of the weight.
    """

    pair: Pair
    ridge: float = 0.0
    inputs: Any = None
    fits: list[Fit] = field(default_factory=list)
    jumps: dict[str, float] = field(default_factory=dict)
    growth: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._module = batch_statistics(self.pair.objective.module)
        self.inputs = self.pair.inputs if self.inputs is None else self.inputs

    def targets(self, state: State, names: frozenset[str]) -> dict[str, Tensor]:
        """Read the results of some linear maps, bias included, at a point."""
        return captured(self._module, state, self.inputs, makes=names)[1]

    def fitted(
        self,
        state: State,
        targets: Mapping[str, Tensor],
        prior: State | None = None,
        features: Callable[[str, Tensor], Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Fit the linear maps named by `targets` in the order in which they run, each on what those before it give.

        Args:
            state: the point; its weights of these maps count only as shapes, unless they are the prior.
            targets: weight -> what the map should give.
            prior: what the ridge is centred on. Default: the state.
            features: changes what a map is fitted on. Default: what it is applied to.

        Returns:
            The new weights and biases by name.
        """
        centre = state if prior is None else prior
        found: dict[str, Tensor] = {}

        def handler(call: SiteCall) -> Tensor | None:
            site = self.pair.execution.site(call.site.weight)
            if site is None or site.weight not in targets:
                return None
            inputs = call.inputs if features is None else features(site.weight, call.inputs)
            wanted = targets[site.weight]
            if site.has_foreign_bias and call.bias is not None:  # a bias that stays as it is
                wanted = wanted - call.bias.reshape(-1, *[1] * site.kernel_dims)
            fit = refit(
                site,
                inputs,
                wanted,
                weight=centre[site.weight],
                bias=None if site.bias is None else centre[site.bias],
                ridge=self.ridge,
                prior=self.ridge > 0,
                precision="single" if self.ridge >= RIDGE and call.weight.dtype == torch.float32 else "double",
            )
            self.fits.append(fit)
            found[site.weight] = fit.weight.to(call.weight)
            ratio = float(found[site.weight].norm() / call.weight.norm().clamp(min=1e-30))
            self.growth[site.weight] = max(ratio, self.growth.get(site.weight, 0.0))
            bias = call.bias
            if site.bias is not None and fit.bias is not None:
                bias = found[site.bias] = fit.bias.to(call.weight)
            return call.apply(found[site.weight], bias)

        run_with(self._module, state, self.inputs, handler)
        return found
