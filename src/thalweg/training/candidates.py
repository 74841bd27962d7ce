"""candidates: the points of a population's trainings that may lie near a critical point."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from thalweg.errors import ConfigError
from thalweg.training.critical import stagnation
from thalweg.training.population import PopulationRun


@dataclass(frozen=True)
class Candidates:
    """Points of least gradient, one for each plateau of each trial, and the last one of each trial.

    Args:
        thetas: the points, shape (points, params).
        trials: the trial of each, from 0.
        steps: the step at which it was there.
        losses: R there.
        gradient_l1: ‖∇R‖₁ there.
    """

    thetas: Float[Tensor, "points params"]
    trials: Int[Tensor, " points"]
    steps: Int[Tensor, " points"]
    losses: Float[Tensor, " points"]
    gradient_l1: Float[Tensor, " points"]


def candidates(run: PopulationRun, *, fraction: float = 0.01) -> Candidates:
    """Collect the empirical critical points of many trainings: of each plateau the point of least gradient.

    Of each trial the point of least gradient in the last stretch of the record counts too, plateau or not: a loss
    that falls to zero like a power of time has no plateau. Diverged trials give what they met before.

    Args:
        run: the trainings.
        fraction: leave out points whose ‖∇R‖₁ exceeds this fraction of the largest that the trial recorded. Default
            0.01, chosen by us: on the paper's 1-D problem plateaux lie below 2e-3 of it and settled points at 1e-14;
            stretches that are flat only because few steps have been taken lie mostly above 0.05.

    Returns:
        The points in the order of trials and of time, possibly none; each once.

    Raises:
        ConfigError: the fraction is not positive.

    **Source:** zhang2021embedding (arXiv 2105.14573), section 5: the trajectories of all trials are searched for
    small gradients. Departure: theirs is one threshold for all, 1e-10, which gradient descent reaches at few points;
    what was reached is in `gradient_l1`.

    Example:
        >>> x = torch.linspace(-1, 1, 5).unsqueeze(1)
        >>> from thalweg.objective import Objective
        >>> from thalweg.training.population import train_population
        >>> objective = Objective(torch.nn.Linear(1, 1), torch.nn.MSELoss(), (x, x**2))
        >>> run = train_population(objective, torch.zeros(2, 2), learning_rate=0.2, steps=100)
        >>> candidates(run).thetas.round(decimals=3).unique(dim=0)
        tensor([[0.0000, 0.5000]])
    """
    if not fraction > 0:
        raise ConfigError(f"Expected a positive fraction. Got {fraction}. Use the default.")
    rows: list[tuple[int, int, float, float, Tensor]] = []
    for trial in range(run.num_trials):
        record = run.trial(trial)
        if not len(record.steps):
            continue
        bound = fraction * float(record.gradient_l1.max())
        found = {p.step: (p.loss, p.gradient_l1, p.theta) for p in stagnation(record)}
        if len(record.theta_steps):
            last = int(record.theta_steps[-1])
            place = int(torch.searchsorted(record.steps, last))
            found[last] = (float(record.losses[place]), float(record.gradient_l1[place]), record.thetas[-1])
        rows += [(trial, step, *found[step]) for step in sorted(found) if found[step][1] <= bound]
    params = run.thetas.shape[1]
    return Candidates(
        thetas=torch.stack([row[4] for row in rows]) if rows else run.thetas.new_zeros(0, params),
        trials=torch.tensor([row[0] for row in rows], dtype=torch.int64),
        steps=torch.tensor([row[1] for row in rows], dtype=torch.int64),
        losses=torch.tensor([row[2] for row in rows], dtype=torch.float64),
        gradient_l1=torch.tensor([row[3] for row in rows], dtype=torch.float64),
    )
