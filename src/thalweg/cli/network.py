"""A user's network on the command line: its module, its checkpoint, an example batch."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from thalweg.cli.launch import import_from_here
from thalweg.cli.lifted import LIFTED_KEY, Relaxed, Statement, metadata_of, rebuilt
from thalweg.cli.references import called, find_object, keywords_of, signature_of
from thalweg.errors import CheckpointError, ConfigError, StructureError
from thalweg.lab.suggest import did_you_mean

if TYPE_CHECKING:
    from torch import Tensor, nn

    from thalweg.structure import View
    from thalweg.structure.trace import Inputs

WIDTHS_KEY = "thalweg.widths"
"""Metadata of a checkpoint that thalweg widened: group -> width, as JSON."""

LARGEST_WIDTH = 1_000_000
"""Units of one group; chosen by us, beyond any layer, so that a slip of the finger is told and not allocated."""

Checkpoint = Annotated[
    Path, typer.Argument(metavar="CKPT", help="Checkpoint: .safetensors, or .pt/.pth with weights only.")
]
Model = Annotated[
    str | None,
    typer.Option(metavar="PKG.MOD:FACTORY", help="What builds the module: module:name, or file.py:name."),
]
Net = Annotated[str | None, typer.Option(metavar="NAME", help="In place of --model: a net of thalweg.nets.")]
Arguments = Annotated[
    list[str] | None, typer.Option("--arg", metavar="KEY=VALUE", help="Argument of the factory; repeat for more.")
]
Shape = Annotated[
    str | None,
    typer.Option("--input", metavar="SHAPE", help="Shape of one input, e.g. 3x32x32. Default: guessed."),
]
Example = Annotated[
    str | None,
    typer.Option(
        metavar="PKG.MOD:NAME", help="An example batch: a tensor, a tuple, a dict of keywords, or what returns it."
    ),
]
TrustPickle = Annotated[
    bool, typer.Option("--trust-pickle", help="Load a checkpoint whose pickle runs code. Only your own files.")
]


@dataclass(frozen=True)
class Network:
    """A user's module with its weights, and a batch that it runs on.

    Args:
        module: in eval mode.
        inputs: example batch, a tuple of arguments or a dict of keyword arguments.
        words: how the batch was come by, for the output.
        widths: widths by group that the checkpoint says it has, as `thalweg embed` and `reduce` write them.
        relaxed: what the module was lifted from, if the checkpoint says so, as `thalweg lift` writes it.
    """

    module: "nn.Module"
    inputs: "Inputs"
    words: str
    widths: dict[str, int]
    relaxed: Relaxed | None = None

    @property
    def lift_metadata(self) -> dict[str, str]:
        """Metadata that a checkpoint of this module needs for being lifted; empty if it is not."""
        return {} if self.relaxed is None else {LIFTED_KEY: self.relaxed.statement.worded()}


def load_network(
    checkpoint: Path | None,
    *,
    model: str | None,
    net: str | None,
    arguments: Sequence[str] | None,
    shape: str | None,
    example: str | None,
    trust_pickle: bool = False,
    inputs: "Inputs | None" = None,
) -> Network:
    """Build a module, fill it from a checkpoint, and find an example batch, unless `inputs` are one.

    A checkpoint that `thalweg embed`, `reduce` or `lift` wrote fits the factory it was made with: the module is
    resized or lifted as the checkpoint says.

    Raises:
        CheckpointError: the checkpoint cannot be read, or does not fit the module.
        ConfigError: the factory or the example cannot be found, called or guessed.
        MemoryLimitError: the module is lifted, and too large for this machine.
    """
    from thalweg.checkpoint import load_state

    if trust_pickle:  # a pickled module needs the code that made it
        import_from_here()
    if trust_pickle and model is not None:
        find_object(model)
    metadata = metadata_of(checkpoint, trust_pickle=trust_pickle) if checkpoint else {}
    state = load_state(checkpoint, trust_pickle=trust_pickle) if checkpoint else None
    statement, widths = Statement.read(metadata), _stated_widths(metadata)
    module = build_module(model, net, arguments)
    dtypes = {t.dtype for t in (state or {}).values() if t.is_floating_point()}
    if len(dtypes) == 1:
        module = module.to(dtypes.pop())
    module.eval()
    if inputs is None:
        stated = statement.shape if statement is not None and example is None else None
        inputs, words = example_of(module, shape or stated, example)
    else:
        words = "the data"
    _settle_lazy_layers(module, inputs)
    if state is None:
        return Network(module, inputs, words, widths)
    if statement is None:
        return Network(_filled(module, inputs, state, widths), inputs, words, widths)
    module, relaxed = _relaxed(module, inputs, statement, state, widths)
    return Network(module, inputs, words, widths, relaxed)


def width_metadata(widths: Mapping[str, int]) -> dict[str, str]:
    """Give the metadata of a checkpoint whose groups have other widths than its factory makes; empty without."""
    return {WIDTHS_KEY: json.dumps(dict(widths))} if widths else {}


def _filled(
    module: "nn.Module", inputs: "Inputs", state: "Mapping[str, Tensor]", widths: dict[str, int]
) -> "nn.Module":
    """Fill a module from a checkpoint, resized first if it says so."""
    from thalweg.checkpoint import load_into

    try:
        load_into(module, state)
    except CheckpointError as error:
        if not _is_of_other_widths(module, state):
            raise
        if not widths:
            raise CheckpointError(f"{error} Give them to the factory: --arg key=value.") from error
        module = _resized(module, inputs, widths)
        load_into(module, state)
    return module


def _relaxed(
    module: "nn.Module",
    inputs: "Inputs",
    statement: Statement,
    state: "Mapping[str, Tensor]",
    widths: dict[str, int],
) -> "tuple[nn.Module, Relaxed]":
    """Lift a module as a checkpoint says, and fill it; resized first if it says so and does not fit as it is."""
    try:
        return rebuilt(module, inputs, statement, state)
    except CheckpointError:
        if not widths:
            raise
    return rebuilt(_resized(module, inputs, widths), inputs, statement, state)


def _settle_lazy_layers(module: "nn.Module", inputs: "Inputs") -> None:
    """Run a module once if a lazy layer of it does not know its size yet."""
    import torch
    from torch.nn.parameter import is_lazy

    from thalweg.structure.trace import call

    if any(is_lazy(p) for p in (*module.parameters(), *module.buffers())):
        with torch.no_grad():
            call(module, inputs)


def _is_of_other_widths(module: "nn.Module", state: "Mapping[str, Tensor]") -> bool:
    own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return any(state[name].shape != own[name].shape for name in own if name in state)


def _stated_widths(metadata: dict[str, str]) -> dict[str, int]:
    try:
        found = json.loads(metadata.get(WIDTHS_KEY, "{}"))
        return {str(name): int(width) for name, width in found.items() if 0 < int(width) <= LARGEST_WIDTH}
    except (ValueError, TypeError, AttributeError):
        return {}


def _resized(module: "nn.Module", inputs: "Inputs", widths: dict[str, int]) -> "nn.Module":
    import torch

    from thalweg.embeddings.surgery import fitting, module_of_sizes
    from thalweg.structure import trace
    from thalweg.structure.comparison import placed_for
    from thalweg.structure.trace import call

    view = trace(module, inputs, verify=False)
    twin = module_of_sizes(module, view, widths)
    # Whether it runs is told by whoever uses it: these widths need not be all that it takes.
    with suppress(Exception), torch.no_grad(), fitting(twin, view, widths):
        call(twin, placed_for(twin, inputs))
    return twin


def build_module(
    model: str | None, net: str | None, arguments: Sequence[str] | None, option: str = "--arg"
) -> "nn.Module":
    """Call the factory that --model or --net names.

    Args:
        model: `module:name` or `file.py:name`.
        net: in its place, a name in thalweg.nets.
        arguments: words `key=value` for the factory.
        option: how the arguments are given, for the messages.

    Raises:
        ConfigError: neither or both are given, it cannot be found or called, or it gives no module.
    """
    from torch import nn

    if (model is None) == (net is None):
        raise ConfigError(
            "Expected one of --model PKG.MOD:FACTORY and --net NAME. "
            f"Got {'neither' if model is None else 'both'}. Say what builds your module."
        )
    factory = find_object(model) if model is not None else _own_net(net or "")
    keywords = keywords_of(arguments or [], option)
    if isinstance(factory, nn.Module) and not keywords:
        return factory
    if not callable(factory):
        raise ConfigError(
            f"Expected {model or net} to build a module. Got one of type {type(factory).__name__}. Name a factory."
        )
    made = called(factory, keywords, name=str(model or net), purpose="build a module", option=option)
    if not isinstance(made, nn.Module):
        raise ConfigError(
            f"Expected {model or net} to return an nn.Module. Got {type(made).__name__}. Mend the factory."
        )
    return made


def _own_net(name: str) -> Any:
    from thalweg import nets

    if not hasattr(nets, name) or name.startswith("_"):
        hint = did_you_mean(name, [n for n in vars(nets) if n[0].isupper()]) or "See thalweg.nets."
        raise ConfigError(f"Expected a net of thalweg.nets. Got {name!r}. {hint}")
    return getattr(nets, name)


def example_of(module: "nn.Module", shape: str | None, example: str | None) -> "tuple[Inputs, str]":
    """Give an example batch and how it was come by: given, drawn in a given shape, or guessed.

    Raises:
        ConfigError: the example cannot be read, or no guess runs.
        StructureError: the module does not run on the given inputs.
    """
    from thalweg.structure.trace import prepared

    if example is not None:
        inputs = _example(example)
        prepared(module, inputs)
        return inputs, example
    if shape is not None:
        inputs = (_drawn(module, _parsed(shape)),)
        prepared(module, inputs)
        return inputs, f"drawn at random, {shape}"
    for guess in _guesses(module):
        try:
            prepared(module, guess)
        except StructureError:
            continue
        return guess, f"guessed, {'x'.join(str(n) for n in guess[0].shape[1:])}"
    raise ConfigError(
        f"Expected an example batch for {type(module).__name__}. Got none, and no guess from its first layer runs. "
        "Give --input SHAPE (of one sample, e.g. 3x32x32) or --example PKG.MOD:NAME."
    )


def _example(reference: str) -> "Inputs":
    from torch import Tensor
    from torch.utils._pytree import tree_leaves

    from thalweg.structure.trace import arguments_of

    found = find_object(reference)
    if callable(found) and not isinstance(found, Tensor):
        try:
            found = found()
        except (Exception, SystemExit) as error:  # whatever a user's function raises
            raise ConfigError(
                f"Expected {reference}{signature_of(found)} to return an example batch. "
                f"Got {type(error).__name__}: {error}. Mend it, or give --input."
            ) from error
    inputs = arguments_of(found)
    if not any(isinstance(leaf, Tensor) for leaf in tree_leaves(inputs)):
        got = "an empty tuple" if found == () else f"one of type {type(found).__name__}"
        raise ConfigError(
            f"Expected {reference} to be a tensor, or a tuple of them, or a dict of keyword arguments. Got {got}. "
            "Check --example."
        )
    return inputs


def _parsed(shape: str) -> list[int]:
    try:
        sizes = [int(n) for n in shape.lower().split("x")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1:
        raise ConfigError(f"Expected --input of one sample, e.g. 3x32x32. Got {shape!r}. Leave out the batch.")
    return sizes


def _drawn(module: "nn.Module", sizes: Sequence[int]) -> Any:
    import torch
    from torch import nn

    generator = torch.Generator().manual_seed(0)
    first = _first_layer(module)
    if isinstance(first, nn.Embedding):
        return torch.randint(first.num_embeddings, (4, *sizes), generator=generator)
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    try:
        return torch.randn(4, *sizes, generator=generator, dtype=torch.float64).to(dtype)
    except RuntimeError as error:
        raise ConfigError(
            f"Expected --input of a batch that fits in memory. Got {'x'.join(map(str, sizes))}. Give less."
        ) from error


def _first_layer(module: "nn.Module") -> "nn.Module | None":
    """Find the first layer of a kind that tells what goes in."""
    from torch import nn

    norms = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm)
    kinds = (nn.Embedding, nn.modules.conv._ConvNd, nn.Linear, nn.RNNBase, *norms)
    return next((m for m in module.modules() if isinstance(m, kinds)), None)


def _guesses(module: "nn.Module") -> Iterator[tuple[Any, ...]]:
    """Batches that the first layer with weights would take, the commonest sizes first."""
    from torch import nn

    first = _first_layer(module)
    if isinstance(first, nn.Embedding):
        for length in (8, 4, 2):
            yield (_drawn(module, [length]),)
    elif isinstance(first, nn.modules.conv._ConvNd):
        for size in (32, 28, 64, 96, 128, 224, 16, 8):
            yield (_drawn(module, [first.in_channels] + [size] * len(first.kernel_size)),)
    elif isinstance(first, nn.Linear | nn.RNNBase):
        width = first.in_features if isinstance(first, nn.Linear) else first.input_size
        yield (_drawn(module, [width]),)
        yield (_drawn(module, [7, width]),)
    elif isinstance(first, nn.modules.batchnorm._BatchNorm | nn.LayerNorm):
        width = (
            first.num_features if isinstance(first, nn.modules.batchnorm._BatchNorm) else first.normalized_shape[-1]
        )
        yield (_drawn(module, [width]),)


def count_parameters(module: "nn.Module") -> int:
    """Count the entries of all parameters, a tied one once."""
    return sum(p.numel() for p in module.parameters())


def describe(view: "View") -> list[list[str]]:
    """Give one row for each group: name, size, flags, what makes it, what reads it."""
    rows = []
    for group in view.groups:
        makes = [f"{m.tensor}[{m.dim}]" for m in group.members if m.role != "consumer"]
        reads = [f"{m.tensor}[{m.dim}]" for m in group.members if m.role != "producer"]
        rows.append([group.name, str(group.size), ", ".join(group.flags), _some(makes), _some(reads)])
    return rows


def _some(names: Sequence[str]) -> str:
    more = f" +{len(names) - 3}" if len(names) > 3 else ""
    return " ".join(names[:3]) + more or "–"
