"""Which unit of one network is which unit of another: any two networks with views, streamed over all data."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from thalweg.batching import batches_of, num_samples, rows_of
from thalweg.errors import ConfigError, DataError, StructureError
from thalweg.structure.trace import arguments_of
from thalweg.structure.view import View
from thalweg.teacher_student.counterparts import LayerMatch, Match
from thalweg.teacher_student.sight import Found, Sight, comparison, correlated, require_memory

Layers = str | Sequence[Any]
"""Which layers meet: "auto", "in order", "best", or pairs (group of A, group of B)."""

Pairs = Sequence[tuple[str, str]]

_EXAMPLES = 4  # samples that the networks are traced on; chosen by us


def match(
    a: nn.Module,
    b: nn.Module,
    data: Any,
    *,
    layers: Layers = "auto",
    earlier: Sequence[nn.Module] = (),
    batch_size: int | None = None,
    views: tuple[View, View] | None = None,
    progress: Callable[[float, str], None] | None = None,
) -> Match:
    """Find which unit of a network B is which unit of a network A, by the correlation of what they do on data.

    The activation of a unit is what the linear maps take that read it (after nonlinearity and normalisation); where
    none does, what the maps give that make it. Of a group that several maps read, the correlations are averaged if
    both networks have as many; else the last of each are compared. Each position of a feature map or sequence is a
    sample. If the sizes differ, maps are averaged over neighbourhoods to the smaller size; if one network has no
    positions there, or flattened ones of another number, each input's average over positions is compared.

    Args:
        a: the reference: a teacher, the network before pruning or fine-tuning. Run in eval mode, not changed.
        b: the other one, of any architecture that takes the same inputs.
        data: inputs, (inputs, targets), or a re-iterable of batches (inputs, targets); targets are not used.
        layers: which group of A is compared with which of B: "in order" (of the forward pass), "best" (for each
            group of A the one of B with the highest ρ̄), or pairs of names. Default "auto": in order if both have
            as many groups that can be compared, else "best".
        earlier: B at earlier times, for instance at its initialisation: did the winners lead from the start?
        batch_size: samples that are run at once, of data that are not in batches. Default: all that memory allows;
            fewer are run at once where the activations are large. It does not change the result, unless a network
            takes statistics of the batch in eval mode too (`track_running_stats=False`).
        views: of both. Default: traced on the first samples.
        progress: called with the share that is done, and a text.

    Returns:
        Correlations, layer by layer, and what they tell.

    Raises:
        ConfigError: layers that are asked for are no pairs of names, or the batch size is not positive.
        DataError: there are no data, or they are of another form.
        StructureError: a network does not run on the data, a view or an earlier B is of another architecture, or
            there is nothing that can be compared.
        NumericalError: activations that are not finite.
        MemoryLimitError: the correlations of all these layers do not fit into memory.

    **Source:** ρ, ρ̄ and r̄: tian2019luck (arXiv 1905.13405), section 4.2; one-to-one: Li et al. 2015 (arXiv
    1511.07543). Departures: any architecture; all samples count; units that do not vary are left out of the means.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        >>> with torch.no_grad():
        ...     _ = net[0].weight.copy_(torch.randn(4, 3, generator=torch.Generator().manual_seed(0)))
        >>> x = torch.randn(50, 3, generator=torch.Generator().manual_seed(1))
        >>> found = match(net, net, x)
        >>> [(m.a, m.best.tolist(), round(m.mean_best, 6)) for m in found.layers]
        [('0', [0, 1, 2, 3], 1.0)]
    """
    if batch_size is not None and batch_size < 1:
        raise ConfigError(f"Expected a batch size of at least 1. Got {batch_size}. Leave it out for all at once.")
    batches = _batches(data, batch_size)
    example = _example(batches)
    own = views or (None, None)
    ours, theirs = (Sight.of(net, example, name, view) for net, name, view in zip((a, b), "AB", own, strict=True))
    olden = [Sight.of(net, example, "an earlier B", theirs.view) for net in earlier]
    told = progress or _silent
    wanted, skipped = _wanted(ours, theirs, layers)
    has_table = wanted is None
    pairs, words = _comparable(ours, theirs, example, wanted, skipped)
    others = [theirs] if has_table else [theirs, *olden]
    require_memory(ours, others, pairs)
    share = 0.5 if has_table and olden else 1.0
    found, count = correlated(ours, others, pairs, batches, lambda done, text: told(share * done, text))
    table = {pair: _layer(pair, found[pair], "").mean_best for pair in pairs} if has_table else {}
    if has_table:
        pairs = _best_pairs(table)
    if has_table and olden:
        more, _ = correlated(ours, olden, pairs, batches, lambda done, text: told(0.5 + 0.5 * done, text))
        found = {pair: [*found[pair], *more[pair]] for pair in pairs}
    return Match(tuple(_layer(pair, found[pair], words[pair]) for pair in pairs), count, table, skipped)


def _batches(data: Any, batch_size: int | None) -> Any:
    """Give data as batches (inputs, targets)."""
    if isinstance(data, Tensor):
        if not data.ndim or not len(data):
            raise DataError("Expected at least one sample. Got none. Check the data.")
        data = (data, torch.zeros(len(data)))
    return batches_of(data, batch_size)


def _example(batches: Any) -> Any:
    """Give a few samples of the first batch, as arguments of a network."""
    batch = tuple(next(iter(batches)))
    try:
        num_samples(batch)
    except DataError:
        return arguments_of(batch[0])
    return arguments_of(rows_of(batch, slice(_EXAMPLES))[0])


def _silent(fraction: float, text: str) -> None:
    """Say nothing."""


def _wanted(ours: Sight, theirs: Sight, layers: Layers) -> tuple[list[tuple[str, str]] | None, dict[str, str]]:
    """Choose which group is compared with which (None: all with all), and say which cannot be."""
    reason = "no linear map reads or makes its units"
    skipped = {f"{sight.name}: {group}": reason for sight in (ours, theirs) for group in sight.unseen}
    if not isinstance(layers, str):
        if not isinstance(layers, Sequence) or not layers:
            raise ConfigError(
                f'Expected layers "auto", "in order", "best" or pairs of names, at least one. Got {layers!r}. '
                "Choose one."
            )
        return [_named(ours, theirs, pair, reason) for pair in layers], {}
    if layers not in ("auto", "in order", "best"):
        raise ConfigError(
            f'Expected layers "auto", "in order", "best" or pairs of names. Got {layers!r}. Choose one.'
        )
    if layers == "best" or (layers == "auto" and len(ours.groups) != len(theirs.groups)):
        return None, skipped
    if len(ours.groups) != len(theirs.groups):
        raise StructureError(
            f"Expected as many groups of units in both networks to pair them in order. Got {len(ours.groups)} and "
            f'{len(theirs.groups)}. Choose "best", or name pairs.'
        )
    return list(zip(ours.groups, theirs.groups, strict=True)), skipped


def _named(ours: Sight, theirs: Sight, pair: Any, reason: str) -> tuple[str, str]:
    """See that a pair that is asked for is one of groups that can be seen."""
    if not isinstance(pair, tuple | list) or [type(name) for name in pair] != [str, str]:
        raise ConfigError(f"Expected layers as pairs (group of A, group of B). Got {pair!r}. Name both.")
    for sight, name in zip((ours, theirs), pair, strict=True):
        if name not in sight.groups:
            why = reason if name in sight.unseen else "which is no group"
            raise StructureError(
                f"Expected one of the groups {', '.join(sight.groups) or '(none)'} of {sight.name}. Got {name!r}: "
                f"{why}. See thalweg view."
            )
    return pair[0], pair[1]


def _comparable(
    ours: Sight, theirs: Sight, example: Any, wanted: Pairs | None, skipped: dict[str, str]
) -> tuple[list[tuple[str, str]], dict[tuple[str, str], str]]:
    """Keep the pairs that can be compared, and say how; note the others."""
    seen = [sight.see(example, sight.groups) for sight in (ours, theirs)]
    chosen = [(one, two) for one in seen[0] for two in seen[1]] if wanted is None else wanted
    words = {}
    for one, two in chosen:
        how = comparison(seen[0][one], seen[1][two])
        if how.refusal:
            skipped[f"{one} = {two}"] = how.refusal
        else:
            words[one, two] = how.words
    if not words:
        empty = " and ".join(sight.name for sight in (ours, theirs) if not sight.groups)
        reasons = [f"{name}: {reason}" for name, reason in skipped.items()]
        why = "; ".join(reasons) or f"no unit of {empty or 'them'} decides the outputs on the first samples"
        raise StructureError(
            f"Expected groups of units in both networks that can be compared. Got none ({why}). See thalweg view."
        )
    return list(words), words


def _best_pairs(table: dict[tuple[str, str], float]) -> list[tuple[str, str]]:
    """Choose for each group of A the group of B with the highest mean best correlation."""
    best: dict[str, tuple[str, str]] = {}
    for pair in sorted(table, key=lambda pair: -1.0 if math.isnan(table[pair]) else table[pair]):
        best[pair[0]] = pair
    return [best[one] for one in dict.fromkeys(one for one, _ in table)]


def _layer(pair: tuple[str, str], found: Sequence[Found], words: str) -> LayerMatch:
    now, *before = found
    alive_b, alive_a = now.alive
    earlier = tuple(old.correlation for old in before)
    return LayerMatch(*pair, now.correlation, alive_a, alive_b, now.num_rows, words, earlier)
