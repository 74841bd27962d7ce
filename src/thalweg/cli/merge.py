"""`thalweg merge`: one checkpoint out of two, between them, with its statistics repaired."""

import datetime
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import thalweg
from thalweg.cli.embed import free_target
from thalweg.cli.landscape import BatchSize, Data, DataArguments, DataSplit, Loss, NumSamples, Seed, load_landscape
from thalweg.cli.launch import timed
from thalweg.cli.network import Arguments, Model, Net, TrustPickle
from thalweg.cli.options import AsJson, DataRoot, Device, checked_device
from thalweg.cli.parts import Value
from thalweg.cli.reduce_on_data import free_page
from thalweg.cli.verdicts import print_json, show_rows
from thalweg.errors import ConfigError
from thalweg.lab.plain import plain
from thalweg.lab.progress import shown_progress
from thalweg.lab.suggest import did_you_mean

if TYPE_CHECKING:
    from thalweg.cli.networks import Networks
    from thalweg.ensembles import Merged

MATCHES = {"weights": "weights", "activations": "activations", "straight-through": "straight through", "none": "none"}
METHODS = ("midpoint", "joint")


def merge(  # noqa: PLR0913, PLR0917 - one argument per option of the command line
    a: Annotated[Path, typer.Argument(metavar="A", help="Checkpoint: .safetensors, or .pt/.pth with weights only.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Checkpoint of the same network.")],
    data: Data,
    model: Model = None,
    net: Net = None,
    arguments: Arguments = None,
    match: Annotated[
        str, typer.Option(help="What units are matched by: weights, activations, straight-through or none.")
    ] = "weights",
    at: Annotated[float, typer.Option(help="Where to merge: 0 is A, 1 is B.")] = 0.5,
    method: Annotated[
        str, typer.Option(help="midpoint averages weights; joint fits every layer but the first to both networks.")
    ] = "midpoint",
    repair: Annotated[
        bool, typer.Option("--repair/--no-repair", help="Repair the statistics of the merged features.")
    ] = True,
    fit_samples: Annotated[
        int, typer.Option(metavar="N", min=1, help="Samples for matching, fits and repair, at most.")
    ] = 10_000,
    data_arguments: DataArguments = None,
    data_root: DataRoot = None,
    split: DataSplit = None,
    samples: NumSamples = None,
    loss: Loss = None,
    batch_size: BatchSize = None,
    device: Device = "cpu",
    seed: Seed = 0,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where to write. Default: A-merged.safetensors, here.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The page. Default: beside the checkpoint, as .html.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the files.")] = False,
    trust_pickle: TrustPickle = False,
    as_json: AsJson = False,
) -> None:
    """Merge two checkpoints of one network into one: units aligned, weights averaged, statistics repaired."""
    elapsed, started = timed(), datetime.datetime.now(datetime.UTC)
    wishes = {"match": checked(match, MATCHES, "--match"), "method": checked(method, METHODS, "--method"), "at": at}
    if not 0 < at < 1:
        raise ConfigError(f"Expected --at between 0 and 1. Got {at}. 0 is A, 1 is B, 0.5 lies halfway.")
    target = free_target(free_target(out, a, "merged", force=force), b, "merged", force=force)
    page, place = free_page(report, target, force=force), checked_device(device)
    landscape = load_landscape(
        data,
        data_root=data_root,
        arguments=data_arguments,
        split=split,
        num_samples=samples,
        seed=seed,
        batch_size=batch_size,
        loss=loss,
        with_test=True,
    )
    from thalweg.cli.networks import load_networks

    built = {"model": model, "net": net, "arguments": arguments}
    networks = load_networks((a, b), landscape, built, {"trust_pickle": trust_pickle}, place)
    record = _merged(networks, {**wishes, "repair": repair, "seed": seed}, fit_samples, target)
    record |= {"report": str(page), "device": place, "command": shlex.join(["thalweg", *sys.argv[1:]])}
    record |= {"started": started.isoformat(timespec="seconds"), "seconds": round(elapsed(), 3)}
    from thalweg.cli.merge_page import write_page

    plainly = plain(record)
    write_page(page, plainly)
    if as_json:
        print_json({**plainly, "version": thalweg.__version__})
        return
    _show(plainly)


def checked(word: str, known: Any, option: str) -> str:
    """See that an option has one of the known values.

    Raises:
        ConfigError: it has not.
    """
    if word not in known:
        hint = did_you_mean(word, known) or "Choose one of them."
        raise ConfigError(f"Expected {option} {', '.join(known)}. Got {word!r}. {hint}")
    return word


def _merged(networks: "Networks", wishes: Mapping[str, Any], fit_samples: int, target: Path) -> Value:
    """Merge, write, and measure every step and what was written."""
    from thalweg.cli.networks import values, write_network
    from thalweg.ensembles import merge as merge_pair
    from thalweg.ensembles.merging import require_units
    from thalweg.paths.pair import Pair

    a, b = networks.files
    pair = Pair.of(networks.train, *networks.states, fit_samples=fit_samples, seed=wishes["seed"])
    if wishes["match"] != "none":
        require_units(pair)
    with shown_progress("merge") as report:
        report(0.05, "the units of both networks")
        found = merge_pair(pair, **{**wishes, "match": MATCHES[wishes["match"]]})
        report(0.6, "every step, measured")
        scores = {name: found.scores(objective) for name, objective in networks.objectives()}
        measured = write_network(networks, found.state, target, f"{a.name} + {b.name}")
        report(1.0, "done")
    words = step_words(found, wishes)
    steps = [
        {"name": name, "words": words[name], **{split: values(scores[split][name]) for split in scores}}
        for name in found.states
    ]
    return {
        "file": str(target),
        "a": str(a),
        "b": str(b),
        **wishes,
        "data": networks.landscape.data_words,
        "test_data": networks.landscape.test_words or None,
        "loss": networks.landscape.loss_words,
        "steps": steps,
        "measured": measured,
        "moved": _moved(found),
        "notes": list(found.notes),
    }


def step_words(found: "Merged", wishes: Mapping[str, Any]) -> dict[str, str]:
    """Word each step of a merge."""
    aligned = "joint fit" if wishes["method"] == "joint" else f"aligned by {wishes['match']}"
    before = list(found.states)[-2]
    words = {"A": "A", "B": "B", "plain": "midpoint" if wishes["at"] == 0.5 else f"plain, at {wishes['at']:g}"}
    words |= {"aligned": aligned}
    return words | {"repaired": f"{words[before]}, repaired"}


def _moved(found: "Merged") -> dict[str, list[int]]:
    """Say of each group how many of its units change their place, of how many."""
    return {
        name: [sum(int(order[i]) != i for i in range(len(order))), len(order)]
        for name, order in found.permutations.items()
    }


def _show(record: Value) -> None:
    from thalweg.cli.merge_page import again_rows, step_rows

    typer.echo(f"{record['data']}; loss: {record['loss']}")
    show_rows(*step_rows(record))
    for note in record["notes"]:
        typer.echo(note)
    typer.echo(f"wrote {record['file']}; measured again from it:")
    show_rows(*again_rows(record))
    typer.echo(f"report: {Path(record['report']).resolve()}")
