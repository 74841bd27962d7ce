"""`thalweg embed`: carry a checkpoint exactly into a wider network."""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from thalweg.cli.network import (
    LARGEST_WIDTH,
    WIDTHS_KEY,
    Arguments,
    Checkpoint,
    Example,
    Model,
    Net,
    Network,
    Shape,
    TrustPickle,
    build_module,
    count_parameters,
    load_network,
)
from thalweg.cli.options import AsJson
from thalweg.cli.verdicts import print_json, show_rows
from thalweg.errors import CheckpointError, ConfigError, PlanError, StructureError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from thalweg.embeddings import Embedded
    from thalweg.structure import View


def embed(  # noqa: PLR0913, PLR0917 - one argument per option of the command line
    checkpoint: Checkpoint,
    widths: Annotated[
        str,
        typer.Option(metavar="NAME=WIDTH,…|x2", help="Width by group (see `thalweg view`), or a factor for all."),
    ],
    model: Model = None,
    net: Net = None,
    arguments: Arguments = None,
    shape: Shape = None,
    example: Example = None,
    shares: Annotated[str, typer.Option(help="Shares of the outgoing weights: equal, or random.")] = "equal",
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of random shares.")] = 0,
    wide: Annotated[
        str | None,
        typer.Option(metavar="PKG.MOD:FACTORY", help="What builds your own wide module, to be filled and checked."),
    ] = None,
    wide_arguments: Annotated[
        list[str] | None,
        typer.Option("--wide-arg", metavar="KEY=VALUE", help="Argument of --wide, or of --model built wide."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where to write. Default: CKPT-wide.safetensors, here.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file.")] = False,
    trust_pickle: TrustPickle = False,
    as_json: AsJson = False,
) -> None:
    """Write a wider checkpoint that computes the same; a critical point stays a critical point."""
    target, how = free_target(out, checkpoint, "wide", force=force), _shares(shares)
    network = load_network(
        checkpoint,
        model=model,
        net=net,
        arguments=arguments,
        shape=shape,
        example=example,
        trust_pickle=trust_pickle,
    )
    own = None
    if wide or wide_arguments:
        own = like(build_module(wide or model, None if wide else net, wide_arguments, "--wide-arg"), network)
    made, kept = _embedded(network, widths, how, seed, own)
    require_rebuilt(network, made.module, lambda: own, "Give --wide or --wide-arg, so that they can be compared")
    from thalweg.checkpoint import save_state

    widened = {**network.widths, **made.embedding.plan.widths}
    metadata = {WIDTHS_KEY: json.dumps(widened), "thalweg.source": checkpoint.name, **network.lift_metadata}
    save_state(target, made.module.state_dict(), metadata)
    _show(network, made, kept, target, as_json=as_json)


def _show(network: Network, made: "Embedded", kept: Mapping[str, str], target: Path, *, as_json: bool) -> None:
    rows = [[n, str(s.narrow), str(s.wide)] for n, s in made.embedding.plan.splits.items()]
    before, after = count_parameters(network.module), count_parameters(made.module)
    if as_json:
        plan = {n: {"narrow": s.narrow, "wide": s.wide} for n, s in made.embedding.plan.splits.items()}
        sizes: dict[str, Any] = {"before": before, "after": after}
        print_json(
            {"file": str(target), "widths": plan, "parameters": sizes, "output_change": made.error, "kept": kept}
        )
        return
    show_rows(["group", "before", "after"], rows)
    for name, reason in kept.items():
        typer.echo(f"{name}: kept at its width. {reason}")
    typer.echo(f"parameters: {before:,} -> {after:,}")
    typer.echo(f"outputs change by {made.error:.1e} (relative; example batch: {network.words})")
    typer.echo(f"wrote {target}: load_state_dict takes it into your module built with these widths")


def like(module: "nn.Module", network: Network) -> "nn.Module":
    """Give a module the dtype of a network's parameters, in eval mode."""
    return module.to(next(network.module.parameters()).dtype).eval()


def require_rebuilt(
    network: Network, resized: "nn.Module", build: "Callable[[], nn.Module | None]", advice: str
) -> None:
    """See that a resized checkpoint says all: buffers that it leaves out are what the user's factory makes.

    Args:
        network: before.
        resized: after; its state dict is what will be written.
        build: makes a module as the user's factory does at these widths; None where that is not known.
        advice: what to do where it is not.

    Raises:
        CheckpointError: resizing changed a non-persistent buffer, and the user's own is not known to equal it.
    """
    written = resized.state_dict().keys()
    before = dict(network.module.named_buffers())
    after = {n: b for n, b in resized.named_buffers() if n not in written and not _is_equal(before[n], b)}
    own = build() if after else None
    theirs = dict(own.named_buffers()) if own is not None else {}
    for name, buffer in after.items():
        if name in theirs and _is_equal(buffer, theirs[name]):
            continue
        got = "another one in your own module" if name in theirs else "no module of these widths to tell"
        raise CheckpointError(
            f"Expected the resized buffer {name!r}, which is not persistent and so in no checkpoint, to be what your "
            f"factory makes. Got {got}. {advice}, or register it with persistent=True."
        )


def _is_equal(one: "Tensor", two: "Tensor") -> bool:
    """Say whether two tensors are the same up to a few roundings."""
    if one.shape != two.shape:
        return False
    if not (one.is_floating_point() or one.is_complex()):
        return bool((one == two).all())
    import torch

    return bool(torch.isclose(one, two.to(one), rtol=4 * torch.finfo(one.dtype).eps, equal_nan=True).all())


def _shares(word: str) -> Literal["equal", "random"]:
    if word == "equal":
        return "equal"
    if word == "random":
        return "random"
    raise ConfigError(f"Expected --shares equal or random. Got {word!r}. For given shares use thalweg.embed.")


def free_target(out: Path | None, checkpoint: Path, what: str, *, force: bool) -> Path:
    """Give the file to write, before any work is done.

    Raises:
        CheckpointError: it is there already, is the source, is of no known kind, or its folder is not there.
    """
    target = out or Path(f"{checkpoint.stem}-{what}.safetensors")
    if target.suffix not in (".safetensors", ".pt", ".pth"):
        raise CheckpointError(f"Expected --out ending in .safetensors, .pt or .pth. Got {target}. Rename it.")
    try:
        is_placed = target.parent.is_dir()
        target.exists()
    except OSError as error:  # a name too long, a folder that may not be entered
        raise CheckpointError(f"Expected a place for --out. Got {error.strerror}. Choose another --out.") from error
    if not is_placed:
        raise CheckpointError(f"Expected a folder {target.parent}. Got none. Make it, or choose another --out.")
    if target.is_dir():
        raise CheckpointError(f"Expected a file for --out. Got the folder {target}. Name a file in it.")
    if target.exists() and checkpoint.exists() and target.samefile(checkpoint):
        raise CheckpointError(f"Expected --out to differ from the checkpoint. Got {target}. Choose another --out.")
    if target.exists() and not force:
        raise CheckpointError(f"Expected a new file. Got {target}, which is there. Use --force to overwrite it.")
    return target


def parsed_widths(text: str, view: "View") -> dict[str, int]:
    """Read `name=width,name=x2,…`, or `x2` for every group that can grow.

    Raises:
        ConfigError: not of that form, or a width that no layer has.
        StructureError: no such group.
    """
    if factor := _factor(text):
        widths = {g.name: factor * g.size for g in view.groups if g.is_duplicable}
    else:
        widths = _widths_by_name(text, view)
    for name, width in widths.items():
        if width > LARGEST_WIDTH:
            raise ConfigError(f"Expected at most {LARGEST_WIDTH:,} units. Got {width:,} for {name!r}. Choose fewer.")
    return widths


def _widths_by_name(text: str, view: "View") -> dict[str, int]:
    widths: dict[str, int] = {}
    for word in filter(None, (w.strip() for w in text.split(","))):
        name, equals, value = word.rpartition("=")
        size = view.group(name).size if equals else 0
        if name in widths:
            raise ConfigError(f"Expected one width for each group. Got {name!r} twice. Leave one out of --widths.")
        if equals and (factor := _factor(value)):
            widths[name] = factor * size
        elif equals and re.fullmatch(r"[0-9]{1,20}", value):
            widths[name] = int(value)
        else:
            raise ConfigError(f"Expected --widths name=64,name=x2 or x2. Got {word!r}. See `thalweg view` for names.")
    if not widths:
        raise ConfigError("Expected --widths name=64,name=x2 or x2. Got nothing. See `thalweg view` for names.")
    return widths


def _factor(word: str) -> int:
    """Read x2 or 2x; 0 for anything else."""
    found = re.fullmatch(r"x([0-9]{1,20})|([0-9]{1,20})x", word.strip().lower())
    return int(found[1] or found[2]) if found else 0


def _embedded(
    network: Network, widths: str, shares: Literal["equal", "random"], seed: int, own: "nn.Module | None"
) -> "tuple[Embedded, dict[str, str]]":
    """Embed; under one factor for all groups, leave those at their width that cannot take it, and say why."""
    import torch

    from thalweg.embeddings import embed as embed_module
    from thalweg.structure import trace

    view = trace(network.module, network.inputs)
    wanted = parsed_widths(widths, view)
    if not wanted:
        raise PlanError(f"Expected a group that can grow. Got none among {len(view.groups)}. See `thalweg view`.")

    def attempt(some: dict[str, int]) -> "Embedded":
        generator = torch.Generator().manual_seed(seed)
        return embed_module(
            network.module, network.inputs, some, shares=shares, view=view, generator=generator, wide=own
        )

    try:
        return attempt(wanted), {}
    except (StructureError, PlanError):
        if not _factor(widths) or own is not None:
            raise
    free, kept = {}, {}
    for name, width in wanted.items():
        try:
            attempt({name: width})
        except (StructureError, PlanError) as error:
            kept[name] = str(error)
        else:
            free[name] = width
    if not free:
        name, reason = next(iter(kept.items()))
        raise PlanError(f"Expected a group that can grow. Got none of {len(kept)}; the first, {name}: {reason}")
    return attempt(free), kept
