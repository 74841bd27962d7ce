"""The panel: every method on one pair of networks, measured along its whole path, in one table."""

import contextlib
import functools
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path as File
from typing import Any, Literal

from thalweg.errors import ConfigError, StructureError
from thalweg.objective import Objective
from thalweg.paths.methods import METHODS, Connection, Method, Progress, Settings, connect, obstacle
from thalweg.paths.pair import Pair
from thalweg.paths.profile import Profile, profile

Status = Literal["measured", "does not apply", "failed"]
Own = Callable[[Pair], Connection]
"""A method of your own, or a trained one: from a pair to a connection."""

POINTS = 61
"""Points of a profile. As in the authors' code."""


@dataclass(frozen=True)
class PanelRow:
    """What one method did.

    Args:
        method: its name.
        words: what it does.
        source: key of the paper, or "ours".
        status: measured, does not apply, or failed.
        reason: why, where it is not measured.
        connection: the path.
        profile: loss and accuracy along it.
        seconds: connecting and measuring.
        peak_bytes: the most memory that the process held meanwhile; None where the system does not say.
    """

    method: str
    words: str
    source: str
    status: Status
    reason: str = ""
    connection: Connection | None = None
    profile: Profile | None = None
    seconds: float = 0.0
    peak_bytes: int | None = None

    def values(self) -> dict[str, Any]:
        """Give the row of the table; "met" columns hold for t up to where B's function is reached."""
        row: dict[str, Any] = {"method": self.method, "status": self.status, "words": self.words}
        if self.connection is None or self.profile is None:
            return row | {"reason": self.reason}
        met = self.profile.times <= self.connection.meets
        found = self.profile
        row |= {
            "worst_train_loss": found.worst.loss,
            "worst_t": found.worst.t,
            "barrier": found.barrier,
            "met_train_loss": float(found.train_loss[met].max()),
        }
        for name in ("train_accuracy", "test_accuracy"):
            values = getattr(found, name)
            row[f"worst_{name}"] = None if values is None else float(values.min())
            row[f"met_{name}"] = None if values is None else float(values[met].min())
        row["worst_test_loss"] = None if found.test_loss is None else float(found.test_loss.max())
        return row | {
            "legs": len(self.connection.path.legs),
            "length": self.connection.path.length(),
            "connect_seconds": self.connection.seconds,
            "seconds": self.seconds,
            "peak_bytes": self.peak_bytes,
            "fits": self.connection.fits,
            "worst_fit": self.connection.worst_fit,
            "notes": "; ".join(self.connection.notes),
        }


def panel(  # noqa: PLR0913 - the pair, the methods, and what each is measured on
    pair: Pair,
    methods: Sequence[str | Method] = tuple(METHODS),
    *,
    own: Mapping[str, Own] | None = None,
    on: Objective | None = None,
    test: Objective | None = None,
    points: int = POINTS,
    settings: Settings | None = None,
    progress: Progress | None = None,
    done: Callable[[PanelRow], None] | None = None,
) -> tuple[PanelRow, ...]:
    """Connect a pair by every method and measure each path.

    A method that does not apply says why; one that fails does not stop the others.

    Args:
        pair: the networks.
        methods: names of `METHODS`, or compositions of your own.
        own: further methods by name: trained curves, flows, functions of yours.
        on: the landscape that paths are measured on. Default: the pair's, which fits and trained paths are made on.
        test: the landscape on test data.
        points: of a profile, at least; every leg has one within it.
        settings: of the closed-form methods.
        progress: called as progress(fraction, text).
        done: called with each row as it is finished.

    Returns:
        One row for each method, in order.

    Raises:
        ConfigError: an unknown method.

    **Source:** Anokhin & Yarotsky 2020 (arXiv 2008.00741), tables 1 and 2.
    """
    wanted: list[tuple[tuple[str, str, str], Method | Own]] = []
    for entry in methods:
        method = named(entry) if isinstance(entry, str) else entry
        wanted.append(((method.name, method.words, method.source), method))
    for name, make in (own or {}).items():
        words = (getattr(make, "__doc__", None) or name).partition("\n")[0]
        wanted.append(((name, words, "trained"), make))
    rows = []
    for place, (heading, what) in enumerate(wanted):

        def tell(fraction: float, text: str, place: int = place) -> None:
            if progress is not None:
                progress(min((place + fraction) / len(wanted), 1.0), text)

        tell(0.0, heading[0])
        reason = obstacle(pair, what) if isinstance(what, Method) else None
        if reason is not None:
            row = PanelRow(*heading, "does not apply", reason)
        else:
            measure = functools.partial(profile, objective=on or pair.objective, test=test, points=points)
            row = _measured(pair, heading, _maker(what, settings, tell), measure, tell)
        rows.append(row)
        if done is not None:
            done(row)
    return tuple(rows)


def named(name: str) -> Method:
    """Find a closed-form method.

    Args:
        name: of `METHODS`.

    Returns:
        The method.

    Raises:
        ConfigError: no such method.
    """
    if name not in METHODS:
        raise ConfigError(f"Expected one of {', '.join(METHODS)}. Got {name!r}. Choose a method.")
    return METHODS[name]


def _maker(what: Method | Own, settings: Settings | None, tell: Progress) -> Own:
    if not isinstance(what, Method):
        return what
    return lambda pair: connect(pair, what, settings, progress=lambda x, text: tell(x / 2, text))


def _measured(
    pair: Pair, heading: tuple[str, str, str], make: Own, measure: Callable[..., Profile], tell: Progress
) -> PanelRow:
    began = time.perf_counter()
    try:
        with _peak() as peak:
            connection = make(pair)
            found = measure(connection.path, progress=lambda x, text: tell((1 + x) / 2, f"{heading[0]}: {text}"))
    except StructureError as error:
        return PanelRow(*heading, "does not apply", str(error), seconds=time.perf_counter() - began)
    except Exception as error:  # one method, your own among them, does not stop the others
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        return PanelRow(*heading, "failed", reason, seconds=time.perf_counter() - began)
    seconds = time.perf_counter() - began
    return PanelRow(*heading, "measured", "", connection, found, seconds, peak[0])


@contextlib.contextmanager
def _peak() -> Iterator[list[int | None]]:
    """Measure the peak of resident memory in a block; the system's own counter is set back where it can be."""
    found: list[int | None] = [None]
    clear, status = File("/proc/self/clear_refs"), File("/proc/self/status")
    with contextlib.suppress(OSError):
        clear.write_text("5")
    yield found
    try:
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        found[0] = int(line.split()[1]) * 1024
    except (OSError, StopIteration, ValueError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        found[0] = peak if sys.platform == "darwin" else peak * 1024
