"""WA-ensembles: the heads of several networks on the features of one, adjusted to them by least squares."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from thalweg.ensembles.backbone import Cut, cut_before, mixed, readers
from thalweg.ensembles.ensemble import Average, Ensemble, ensemble_of
from thalweg.ensembles.members import example_of, fit_inputs, settled
from thalweg.ensembles.statistics import layers_with_statistics, re_estimated, statistics_of
from thalweg.matching.refit import Fit, refit
from thalweg.objective import Objective
from thalweg.paths.adjust import RIDGE
from thalweg.paths.pair import FIT_SAMPLES, State
from thalweg.precision import copied
from thalweg.structure.sites import Site, captured, execution

_MAP_BYTES = 600 * 2**20
"""Bytes of the features that one layer is fitted on, at most; fewer samples are taken where it would be more. Chosen
by us, as for paths."""

_FEWEST = 64
"""Samples for fits at least. Chosen by us, where one sample alone is huge."""


def wa_ensemble(
    objective: Objective,
    networks: Sequence[nn.Module | State],
    *,
    own_layers: int = 1,
    ridge: float = RIDGE,
    fit_samples: int = FIT_SAMPLES,
    average: Average | None = None,
    seed: int = 0,
) -> Ensemble:
    """Put the last layers of several networks onto the features of the first one.

    The first network is the backbone. Of every other one, W_k ← W_k F_k F_1⁺: the first of its own layers is fitted
    to give, from the backbone's features F_1, what it gives in the network itself; the layers behind are its own. In
    a network with skip connections every later layer that reads the backbone past others is fitted too. Of
    normalisation layers behind the cut the running statistics are taken anew from the data.

    Args:
        objective: the landscape of a module of their architecture, on training data.
        networks: modules, or state dicts; the first is the backbone.
        own_layers: WA(n): how many linear maps, counted from the end, each network has for itself.
        ridge: of the fits, drawn to 0, as a fraction of the mean square of a feature. Default 1e-4, ours: it holds
            the fit where samples are about as many as features. 0 is the paper's least squares.
        fit_samples: samples for fits, at most.
        average: "probabilities" or "outputs". Default: probabilities for class targets, as in the paper.
        seed: of the draw of samples.

    Returns:
        The ensemble. With one own layer and average "outputs" it is one net: `export`.

    Raises:
        ConfigError: fewer than two networks, no such layer, or an average that does not apply.
        ShapeError: the networks are of different architectures.
        CheckpointError: a weight is not finite.
        StructureError: the network cannot be cut there; the message says why.
        DataError: no samples.

    **Source:** Anokhin & Yarotsky 2020 (arXiv 2008.00741), section 6. Departures: the bias is fitted too; the ridge;
    skip connections and normalisation layers, which the paper has not; 10,000 samples at most, not all.

    Example:
        >>> x, y = torch.randn(40, 3), torch.randint(2, (40,))
        >>> nets = [nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2)) for _ in range(3)]
        >>> found = wa_ensemble(Objective(nets[0], nn.CrossEntropyLoss(), (x, y)), nets, average="outputs")
        >>> sorted(found.shared), len(found.fits), sorted(found.export()) == sorted(nets[0].state_dict())
        (['0.bias', '0.weight'], 2, True)
    """
    states = settled(objective, networks, least=2)
    module = copied(objective.module, device=objective.device).eval()
    few, _ = example_of(objective)
    cut = cut_before(module, execution(module, few), own_layers)
    backbone, members, fits = states[0], [states[0]], list[Fit]()
    layers = [n for n in layers_with_statistics(module) if not set(statistics_of(n)) & cut.shared - _counter(n)]
    batches: list[Any] = []
    for state in states[1:]:
        reading = readers(module, cut, backbone, state, few)
        if reading and not batches:
            batches = fit_inputs(objective, _affordable(module, reading, state, few, fit_samples), seed)
        member, made = _fitted(module, cut, (backbone, state), reading, batches, layers, ridge=ridge, seed=seed)
        members.append(re_estimated(objective, member, layers) if layers and reading else member)
        fits += made
    options: dict[str, Any] = {
        "shared": cut.shared,
        "first_own": cut.own[0].weight,
        "own_layers": own_layers,
        "fits": tuple(fits),
        "notes": _notes(fits, layers, ridge),
    }
    return ensemble_of(objective, members, f"WA({own_layers})", average, **options)


def _fitted(
    module: nn.Module,
    cut: Cut,
    pair: tuple[State, State],
    reading: Sequence[Site],
    batches: Sequence[Any],
    layers: Sequence[str],
    *,
    ridge: float,
    seed: int,
) -> tuple[dict[str, Tensor], list[Fit]]:
    """Fit one layer after the other, each on what the backbone and the layers fitted before give."""
    backbone, own = pair
    state, fits = mixed(cut, backbone, own), []
    runs = copied(module, device=next(module.parameters()).device).eval()
    is_several = all(len(t) > 1 for batch in batches for t in tree_leaves(batch) if isinstance(t, Tensor) and t.ndim)
    for name, layer in runs.named_modules():
        if name in layers and is_several:  # its statistics are taken anew afterwards
            layer.train()
    for site in reading:
        features = torch.cat([captured(runs, state, b, reads=[site.weight])[0][site.weight] for b in batches])
        wanted = torch.cat([captured(module, own, b, makes=[site.weight])[1][site.weight] for b in batches])
        bias = None if site.bias is None else own[site.bias]
        if site.has_foreign_bias:  # it stays as it is: fit what remains
            wanted = wanted - _foreign_bias(module, own, batches[0], site)
        fit = refit(
            site,
            features,
            wanted,
            weight=own[site.weight],
            bias=bias,
            ridge=ridge,
            seed=seed,
            precision="single" if ridge >= RIDGE and own[site.weight].dtype == torch.float32 else "double",
        )
        fits.append(fit)
        state[site.weight] = fit.weight
        if site.bias is not None and fit.bias is not None:
            state[site.bias] = fit.bias
    return state, fits


def _foreign_bias(module: nn.Module, state: State, inputs: Any, site: Site) -> Tensor | float:
    from thalweg.structure.sites import SiteCall, run_with

    found: list[Tensor] = []

    def handler(call: SiteCall) -> Tensor | None:
        if call.site.weight == site.weight and call.bias is not None:
            found.append(call.bias.reshape(-1, *[1] * site.kernel_dims))
        return None

    run_with(module, state, inputs, handler)
    return found[0] if found else 0.0


def _affordable(module: nn.Module, reading: Sequence[Site], state: State, few: Any, wanted: int) -> int:
    """Say how many samples to fit on, so that features and targets of one layer fit into memory."""
    names = [site.weight for site in reading]
    taken, given = captured(module, state, few, reads=names, makes=names)
    most = max(t.numel() * t.element_size() // max(len(t), 1) for t in (*taken.values(), *given.values()))
    return min(wanted, max(_MAP_BYTES // max(most, 1), _FEWEST))


def _counter(layer: str) -> frozenset[str]:
    """Name the buffer of a layer that eval mode does not use."""
    return frozenset(name for name in statistics_of(layer) if name.endswith("num_batches_tracked"))


def _notes(fits: Sequence[Fit], layers: Sequence[str], ridge: float) -> tuple[str, ...]:
    notes = []
    scarce = [fit for fit in fits if fit.is_scarce]
    if scarce:
        worst = min(scarce, key=lambda fit: fit.samples / fit.features)
        hint = "more samples hold it" if ridge else "a ridge or more samples hold it"
        notes.append(
            f"{len(scarce)} of {len(fits)} fits had fewer than two samples for each feature (at worst "
            f"{worst.samples:,} for {worst.features:,}): accuracy on other data may suffer; {hint}"
        )
    if fits:
        notes.append(f"largest relative residual of a fit: {max(fit.residual for fit in fits):.3g}")
    if layers:
        notes.append(f"statistics of {len(layers)} normalisation layers behind the cut re-estimated for each member")
    return tuple(notes)
