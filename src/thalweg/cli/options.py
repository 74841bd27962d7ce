"""Options that several commands share."""

import re
from pathlib import Path
from typing import Annotated

import typer

from thalweg.errors import ConfigError

StoreFolder = Annotated[
    Path | None,
    typer.Option(
        "--out",
        metavar="DIR",
        help="Run store. Default: $THALWEG_RUNS, else ./thalweg-runs.",
        show_default=False,
    ),
]
DataRoot = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        envvar="THALWEG_DATA",
        exists=True,
        file_okay=False,
        help="Folder of data sets.",
        show_default=False,
    ),
]
Device = Annotated[str, typer.Option(help="Where tensors live: cpu, cuda, cuda:1, mps.")]
Workers = Annotated[int, typer.Option(min=1, help="Number of processes, each with one thread.")]
Force = Annotated[bool, typer.Option("--force", help="Run again what is in the store.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object, as the last line of stdout.")]


def checked_device(device: str) -> str:
    """See that a device is there; torch is loaded for any but the CPU.

    Raises:
        ConfigError: it is not the name of a device, or not there.
    """
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", device):
        raise ConfigError(f"Expected a device: cpu, cuda, cuda:1 or mps. Got {device!r}. Check --device.")
    if device == "cpu":
        return device
    import torch

    kind, _, index = device.partition(":")
    if kind == "mps":
        is_there = torch.backends.mps.is_available()
    else:
        is_there = int(index or 0) < torch.cuda.device_count()
    if not is_there:
        raise ConfigError(f"Expected a device of this machine. Got {device!r}. Use --device cpu.")
    return device
