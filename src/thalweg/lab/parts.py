"""Parts of a run that are computed once, the share of its progress that each has, and rows that are averaged."""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import thalweg
from thalweg.lab.files import write_whole
from thalweg.lab.recipe import Context
from thalweg.lab.tables import Table


@dataclass
class Share:
    """The part of a run's progress that a piece of work has.

    Args:
        context: of the run.
        start: fraction done when it begins.
        end: when it ends.
    """

    context: Context
    start: float = 0.0
    end: float = 1.0

    def told(self, what: str) -> Callable[[float, str], None]:
        """Give what a training reports to."""
        return lambda x, text: self.context.progress(self.start + (self.end - self.start) * x, f"{what}: {text}")

    def split(self, weights: Sequence[float]) -> "Iterator[Share]":
        """Cut it into pieces of given weights."""
        done, whole = 0.0, sum(weights) or 1.0
        for weight in weights:
            low, high = (self.start + (self.end - self.start) * x / whole for x in (done, done + weight))
            done += weight
            yield Share(self.context, low, high)


def part(context: Context, name: str, data: str, compute: Callable[[Path | None], dict[str, Any]]) -> dict[str, Any]:
    """Compute a part of a run once: an interrupted run that is started again finds what it had.

    What is kept counts only for the version, the device and the data that it was computed with.

    Args:
        context: of the run; without a folder, everything is computed.
        name: of the part.
        data: names the data.
        compute: called with a folder for states to go on from, gives what is kept, of JSON's kinds. The folder, with
            its large states, is removed when that is written.
    """
    if context.folder is None:
        return compute(None)
    file, states = context.folder / f"part-{name}.json", context.folder / f"states-{name}"
    header = {"version": thalweg.__version__, "device": context.device, "data": data}
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        found: dict[str, Any] | None = kept["found"] if kept["header"] == header else None
    except (OSError, ValueError, KeyError, TypeError):
        found = None
    if found is None:
        text = json.dumps({"header": header, "found": compute(states)})
        write_whole(file, text.encode())
        found = json.loads(text)["found"]
    shutil.rmtree(states, ignore_errors=True)
    return found


def averages(rows: Table, keys: Sequence[str], columns: Sequence[str]) -> Table:
    """Average over the rows that agree in some columns, with the range: NAME, NAME_least, NAME_most."""
    found: dict[tuple[Any, ...], Table] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), []).append(row)
    out = []
    for values, own in found.items():
        row = dict(zip(keys, values, strict=True))
        for name in columns:
            numbers = [float(r[name]) for r in own if r.get(name) is not None]
            if numbers:
                row |= {name: mean(numbers), f"{name}_least": min(numbers), f"{name}_most": max(numbers)}
        out.append(row)
    return out
