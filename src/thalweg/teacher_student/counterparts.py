"""Counterparts: what the correlations of two layers tell about which unit is which."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from thalweg.errors import StructureError
from thalweg.teacher_student.correlation import mean_best, mean_rank

COVERED = 0.9
"""From which correlation on a unit counts as covered; chosen by us."""

ALONE = 0.5
"""Below which best correlation a unit of B counts as one without counterpart; chosen by us."""


@dataclass(frozen=True, eq=False)
class LayerMatch:
    """Which unit of a layer of B is which unit of a layer of A.

    Args:
        a: name of A's group of units.
        b: name of B's.
        correlation: ρ of every unit of B (rows) with every unit of A (columns), in [-1, 1]; 0 for dead units.
        alive_a: which units of A vary at all.
        alive_b: which units of B do.
        num_rows: samples, each position of each input counted.
        compared: how positions were compared, in words; empty where there are none.
        earlier: ρ of earlier states of B, in their order.
    """

    a: str
    b: str
    correlation: Float[Tensor, "units_b units_a"]
    alive_a: Bool[Tensor, " units_a"]
    alive_b: Bool[Tensor, " units_b"]
    num_rows: int
    compared: str = ""
    earlier: tuple[Float[Tensor, "units_b units_a"], ...] = ()

    @property
    def best(self) -> Int[Tensor, " units_a"]:
        """For each unit of A the unit of B that correlates best with it; of several equally good ones, the first."""
        return self._ranked.argmax(0)

    @property
    def rho(self) -> Float[Tensor, " units_a"]:
        """Its correlation; 0 for dead units of A."""
        return self.correlation.gather(0, self.best.unsqueeze(0)).squeeze(0)

    @property
    def runner_up(self) -> Float[Tensor, " units_a"]:
        """The second best correlation; NaN where B has one unit that is alive."""
        if int(self.alive_b.sum()) < 2:
            return torch.full_like(self.rho, float("nan"))
        return torch.where(self.alive_a, self._ranked.topk(2, dim=0).values[1], 0.0)

    @property
    def margin(self) -> Float[Tensor, " units_a"]:
        """Specialisation: the best correlation less the second best."""
        return self.rho - self.runner_up

    @property
    def mean_best(self) -> float:
        """ρ̄: the mean of the best correlations over A's units that are alive; NaN without any."""
        return mean_best(self._living) if self.alive_a.any() and self.alive_b.any() else float("nan")

    @property
    def covered(self) -> float:
        """Share of A's living units with a best correlation of at least 0.9; NaN without any."""
        return float((self.rho[self.alive_a] >= COVERED).double().mean())

    @property
    def num_winners(self) -> int:
        """How many different units of B are best for some living unit of A."""
        return len(set(self.best[self.alive_a].tolist())) if self.alive_b.any() else 0

    @property
    def best_in_a(self) -> Int[Tensor, " units_b"]:
        """For each unit of B the unit of A that it correlates best with."""
        return torch.where(self.alive_a, self.correlation, -2.0).argmax(1)

    @property
    def without_counterpart(self) -> Int[Tensor, " units"]:
        """Living units of B whose best correlation is below 0.5."""
        best = torch.where(self.alive_a, self.correlation, -2.0).amax(1)
        return torch.nonzero(self.alive_b & (best < ALONE)).flatten()

    @property
    def partners(self) -> Int[Tensor, " units_a"]:
        """For each unit of A its partner in the one-to-one assignment of largest total; -1 without a partner."""
        ours, theirs = torch.nonzero(self.alive_b).flatten(), torch.nonzero(self.alive_a).flatten()
        found = torch.full_like(self.best, -1)
        if len(ours) and len(theirs):
            rows, columns = linear_sum_assignment(self._living.cpu().numpy(), maximize=True)
            found[theirs[torch.from_numpy(columns)]] = ours[torch.from_numpy(rows)]
        return found

    @property
    def one_to_one(self) -> float:
        """Mean correlation of the partners; NaN without any."""
        partners = self.partners
        columns = torch.nonzero(partners >= 0).flatten()
        return float(self.correlation[partners[columns], columns].mean())

    @property
    def order_a(self) -> Int[Tensor, " units_a"]:
        """A's units by falling best correlation, dead ones last."""
        return torch.where(self.alive_a, self.rho, -2.0).argsort(descending=True, stable=True)

    @property
    def order_b(self) -> Int[Tensor, " units_b"]:
        """B's units in the order of A's that they are nearest to, the best first, dead ones last."""
        place = torch.empty_like(self.order_a)
        place[self.order_a] = torch.arange(len(place), device=place.device)
        own = self.correlation.gather(1, self.best_in_a.unsqueeze(1)).squeeze(1)
        key = place[self.best_in_a] * 4.0 - own
        return torch.where(self.alive_b, key, float("inf")).argsort(stable=True)

    def earlier_means(self) -> tuple[float, ...]:
        """ρ̄ at each earlier state of B."""
        return tuple(mean_best(rho[:, self.alive_a]) if self.alive_a.any() else float("nan") for rho in self.earlier)

    def earlier_ranks(self) -> tuple[float, ...]:
        """r̄ at each earlier state of B: the mean rank there of the units that are best now, 0 first and 1 last."""
        if not self.alive_a.any():
            return tuple(float("nan") for _ in self.earlier)
        return tuple(mean_rank(rho[:, self.alive_a], self.best[self.alive_a]) for rho in self.earlier)

    @property
    def _ranked(self) -> Tensor:
        """ρ with dead units of B behind all others."""
        return torch.where(self.alive_b.unsqueeze(1), self.correlation, -2.0)

    @property
    def _living(self) -> Tensor:
        return self.correlation[self.alive_b][:, self.alive_a]


@dataclass(frozen=True, eq=False)
class Match:
    """Which unit of B is which unit of A, layer by layer.

    Args:
        layers: the layers that were compared, in A's order.
        num_samples: inputs that both networks were run on.
        table: ρ̄ of every group of A with every one of B, (a, b) -> ρ̄; empty where layers were paired without it.
        skipped: groups, or pairs "a = b", that were not compared, and why.
    """

    layers: tuple[LayerMatch, ...]
    num_samples: int
    table: Mapping[tuple[str, str], float]
    skipped: Mapping[str, str]

    def layer(self, a: str) -> LayerMatch:
        """Find the match of a group of A.

        Raises:
            StructureError: it was not compared.
        """
        for layer in self.layers:
            if layer.a == a:
                return layer
        raise StructureError(
            f"Expected one of the matched groups of A: {', '.join(m.a for m in self.layers)}. Got {a!r}. "
            "See skipped for the others."
        )
