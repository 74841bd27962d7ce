"""`thalweg reduce --data`: the width chosen by what is left of the network on a user's data."""

import datetime
import shlex
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

import thalweg
from thalweg.cli.landscape import Landscape, objective_on
from thalweg.cli.launch import timed
from thalweg.cli.network import Network, load_network
from thalweg.cli.parts import Value
from thalweg.cli.reduce import facts, group_rows, write_narrow
from thalweg.cli.snapshots import example_from
from thalweg.cli.verdicts import print_json, show_rows
from thalweg.errors import ConfigError
from thalweg.lab.progress import shown_progress

if TYPE_CHECKING:
    from torch import nn

    from thalweg.embeddings import Comparison, Reduced, TradeOff, TradeOffPoint
    from thalweg.objective import Objective

TOLERANCE = 0.01
"""How much of the agreement may be lost, where the user says nothing. Chosen by us: see `thalweg.embeddings.pick`."""


@dataclass(frozen=True)
class Choice:
    """How the width is chosen.

    Args:
        similarity: at this level; None: by the tolerance.
        amplitudes: fractions of the largest amplitude up to which units are dropped.
        tolerance: of the agreement.
        groups: which groups; None for all.
    """

    similarity: float | None
    amplitudes: tuple[float, ...]
    tolerance: float
    groups: list[str] | None

    @classmethod
    def of(
        cls, similarity: float | None, amplitude: float | None, tolerance: float | None, groups: list[str] | None
    ) -> "Choice":
        """Settle what the user left open.

        Raises:
            ConfigError: an option out of range, or two that exclude each other.
        """
        if similarity is not None and tolerance is not None:
            raise ConfigError("Expected --similarity or --tolerance. Got both. Leave one out: each says which width.")
        if tolerance is not None and not 0 <= tolerance <= 1:
            raise ConfigError(f"Expected --tolerance in [0, 1]. Got {tolerance}. Choose one such as {TOLERANCE}.")
        if similarity is not None and not 0 < similarity <= 1:
            raise ConfigError(f"Expected --similarity in (0, 1]. Got {similarity}. 1 merges equal units only.")
        if amplitude is not None and not 0 <= amplitude < 1:
            raise ConfigError(f"Expected --amplitude in [0, 1). Got {amplitude}. 0 drops what nothing reads.")
        from thalweg.embeddings.tradeoff import AMPLITUDES

        if amplitude is None:
            amplitudes = AMPLITUDES if similarity is None else (0.0,)
        else:
            amplitudes = (amplitude,)
        return cls(similarity, amplitudes, TOLERANCE if tolerance is None else tolerance, groups)

    def taken_from(self, curve: "TradeOff") -> "TradeOffPoint":
        """Choose a point of the curve."""
        from thalweg.embeddings import pick

        if self.similarity is None:
            return pick(curve, min_agreement=1 - self.tolerance)
        return next(p for p in curve.points if p.similarity == self.similarity)

    @property
    def words(self) -> str:
        """The rule."""
        if self.similarity is not None:
            return f"similarity {self.similarity:g}, as asked for"
        return f"fewest units that agree by at least {1 - self.tolerance:g}"


def free_page(report: Path | None, target: Path, *, force: bool) -> Path:
    """Give the file of the report, before any work is done.

    Raises:
        ConfigError: it is there already, is no .html file, or its folder is not there.
    """
    page = report or target.with_suffix(".html")
    if page.suffix != ".html":
        raise ConfigError(f"Expected --report ending in .html. Got {page}. Rename it.")
    if not page.parent.is_dir():
        raise ConfigError(f"Expected a folder {page.parent}. Got none. Make it, or choose another --report.")
    if page.is_dir():
        raise ConfigError(f"Expected a file for --report. Got the folder {page}. Name a file in it.")
    if page.exists() and not force:
        raise ConfigError(f"Expected a new file. Got {page}, which is there. Use --force to overwrite it.")
    return page


def reduce_on_data(
    files: tuple[Path, Path, Path],
    landscape: Landscape,
    choice: Choice,
    built: Mapping[str, Any],
    options: Mapping[str, Any],
    device: str,
    *,
    as_json: bool,
) -> None:
    """Measure the trade-off, choose, write, measure again from the file, and show all of it.

    Args:
        files: the checkpoint, what is written, and the report.
        landscape: data and loss.
        choice: how the width is chosen.
        built: model, net and arguments, as `build_module` takes them.
        options: shape, example and trust_pickle, as `load_network` takes them.
        device: where to compute.
        as_json: print one JSON object in place of tables.

    Raises:
        ThalwegError: the checkpoint, the data or the loss do not fit, or a file cannot be written.
    """
    checkpoint, target, page = files
    elapsed, started = timed(), datetime.datetime.now(datetime.UTC)
    has_example = options["shape"] is not None or options["example"] is not None
    network = load_network(checkpoint, **built, **options, inputs=None if has_example else example_from(landscape))
    objective = _objective(landscape, network.module, device)
    curve = _curve(objective, network if has_example else None, choice)
    chosen = choice.taken_from(curve)
    from thalweg.embeddings import reduce_by

    result = reduce_by(network.module, network.inputs, chosen.reduction)
    write_narrow(network, built, result, target, checkpoint)
    again = load_network(target, **built, shape=None, example=None, inputs=network.inputs)
    measured = _measured_again(landscape, objective, network.module, again.module, device)
    record = {
        **facts(network, result, target),
        **_record(curve, chosen, choice, measured, landscape),
        "report": str(page),
        "device": device,
        "command": shlex.join(["thalweg", *sys.argv[1:]]),
        "started": started.isoformat(timespec="seconds"),
        "seconds": round(elapsed(), 3),
    }
    from thalweg.cli.reduce_page import write_page

    write_page(page, record, curve, chosen, network, result)
    if as_json:
        print_json({**record, "version": thalweg.__version__})
        return
    _show(record, result)


def _objective(landscape: Landscape, module: "nn.Module", device: str, *, is_test: bool = False) -> "Objective":
    """Make the objective; half precision is measured in single."""
    import torch

    own = next(module.parameters()).dtype
    dtype = None if own in (torch.float32, torch.float64) else torch.float32
    return objective_on(landscape, module, is_test=is_test, dtype=dtype, device=device)


def _curve(objective: "Objective", shown: Network | None, choice: Choice) -> "TradeOff":
    """Measure the curve; what is traced is the user's own example, if they gave one, else the first samples."""
    from thalweg.embeddings import trade_off
    from thalweg.embeddings.tradeoff import LEVELS
    from thalweg.structure import trace

    levels = LEVELS if choice.similarity is None else tuple({*LEVELS, choice.similarity})
    with shown_progress("reduce") as report:
        curve = trade_off(
            objective,
            objective.theta(),
            levels=levels,
            amplitudes=choice.amplitudes,
            groups=choice.groups,
            view=trace(shown.module, shown.inputs) if shown is not None else None,
            progress=lambda fraction, text: report(min(fraction, 0.999), text),
        )
        report(1.0, "done")
    return curve


def _measured_again(
    landscape: Landscape, objective: "Objective", before: "nn.Module", after: "nn.Module", device: str
) -> "dict[str, tuple[Comparison, ...]]":
    """Compare what was read back from the file with the network before, on the data and on test data if any."""
    from thalweg.embeddings import compare

    found = {"data": compare(objective, objective.theta(), [after])}
    if landscape.test_data is not None:
        test = _objective(landscape, before, device, is_test=True)
        found["test"] = compare(test, test.theta(), [after])
    return found


def _record(
    curve: "TradeOff",
    chosen: "TradeOffPoint",
    choice: Choice,
    measured: "Mapping[str, tuple[Comparison, ...]]",
    landscape: Landscape,
) -> Value:
    return {
        "data": landscape.data_words,
        "test_data": landscape.test_words or None,
        "loss": landscape.loss_words,
        "rule": choice.words,
        "kept": dict(curve.kept),
        "chosen": plain_point(chosen),
        "points": [plain_point(point) for point in curve.points],
        "measured": {
            name: {"before": asdict(before), "after": asdict(after)} for name, (before, after) in measured.items()
        },
    }


def plain_point(point: "TradeOffPoint") -> Value:
    """Give a point of the curve as plain values."""
    return {
        "similarity": point.similarity,
        "amplitude": point.amplitude,
        "units": point.num_units,
        "widths": point.widths,
        "parameters": point.num_params,
        "is_dominated": point.is_dominated,
        **asdict(point.comparison),
    }


def _show(record: Value, result: "Reduced") -> None:
    from thalweg.cli.reduce_page import again_rows, curve_rows, distinct_points

    typer.echo(f"{record['data']}; loss: {record['loss']}")
    heads, rows = curve_rows(record, is_whole=False)
    show_rows(heads, rows)
    if (hidden := len(distinct_points(record)) - len(rows)) > 0:
        typer.echo(f"{hidden} more points are outdone by one of these: see the report")
    for name, reason in record["kept"].items():
        typer.echo(f"{name}: kept at its width. {reason}")
    typer.echo(f"chosen: {record['rule']}")
    show_rows(*group_rows(result))
    sizes = record["parameters"]
    typer.echo(f"parameters: {sizes['before']:,} -> {sizes['after']:,}")
    typer.echo(f"wrote {record['file']}; measured again from it:")
    show_rows(*again_rows(record))
    typer.echo(f"report: {Path(record['report']).resolve()}")
