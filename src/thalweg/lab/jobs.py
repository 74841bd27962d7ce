"""A job: one run to be, as plain values that travel to another process; and how it is done."""

import contextlib
import hashlib
import json
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from thalweg.errors import ConfigError, StoreError
from thalweg.lab.catalogue import load_recipe
from thalweg.lab.claims import ClaimResult, judge
from thalweg.lab.plain import plain
from thalweg.lab.progress import Progress
from thalweg.lab.recipe import Context, Outcome, Preset, Recipe, silent
from thalweg.lab.runs.environment import Environment, current_environment
from thalweg.lab.runs.identity import run_id
from thalweg.lab.runs.run import (
    ARRAYS,
    LOG,
    SCHEMA_VERSION,
    TABLES,
    TRACEBACK,
    Manifest,
    Run,
    Status,
    table_bytes,
)
from thalweg.lab.runs.store import Store

_SOURCE = "recipe_source"  # of a user's own recipe, among the versions that its manifest records


@dataclass(frozen=True)
class Job:
    """One run to be.

    Args:
        reference: the recipe as `module:NAME`, or its name among the built-in ones.
        preset: name of the preset.
        parameters: every parameter, the seed among them; validated by the preset's model.
        root: folder of the run store.
        device: where tensors live.
        data_root: folder of data sets.
        is_forced: run again what is finished.
    """

    reference: str
    preset: str
    parameters: Mapping[str, Any]
    root: Path
    device: str = "cpu"
    data_root: Path | None = None
    is_forced: bool = False


@dataclass
class _Log:
    """The progress of one run as JSON lines, at most one a second."""

    forward: Progress
    clock: Callable[[], float] = time.monotonic
    lines: list[str] = field(default_factory=list)
    last: float = float("-inf")

    def __call__(self, fraction: float, text: str) -> None:
        if self.clock() - self.last >= 1 or fraction >= 1:
            self.last = self.clock()
            entry = {"time": datetime.now(UTC).isoformat(), "fraction": plain(fraction), "text": text}
            self.lines.append(json.dumps(entry))
        self.forward(fraction, text)

    def content(self) -> bytes:
        """Give the log as a file's content."""
        return "".join(f"{line}\n" for line in self.lines).encode()


def perform(job: Job, progress: Progress = silent) -> Run:
    """Do a job, unless the store already has its run.

    Args:
        job: what to run.
        progress: `progress(fraction, text)`.

    Returns:
        The finished run.

    Raises:
        ConfigError: the recipe or its parameters are wrong.
        StoreError: the store cannot be written.
        Exception: whatever the recipe raised. It is stored with its traceback, whose path is added to it as
            a note, and tried again at the next call.
    """
    recipe = load_recipe(job.reference).recipe
    preset = type(recipe.preset(job.preset)).model_validate(dict(job.parameters))
    store = Store(job.root)
    replaces = job.is_forced
    try:
        found = store.find(run_id(recipe.name, recipe.version, preset.parameters()))
    except StoreError:
        found, replaces = None, True  # damaged: the new run takes its place
    if found is not None and not _is_outdated(found, job, recipe) and not replaces:
        return found
    replaces = replaces or found is not None
    store.prepare()
    partial = store.partial(run_id(recipe.name, recipe.version, preset.parameters()))
    log, started, clock = _Log(progress), datetime.now(UTC), time.perf_counter()

    def manifest(status: Status, claims: tuple[ClaimResult, ...] = ()) -> Manifest:
        seconds = time.perf_counter() - clock
        return _manifest(job, recipe, preset, status, claims, started.isoformat(timespec="milliseconds"), seconds)

    try:
        with _threads(recipe.num_threads):
            outcome = recipe.run(preset, Context(log, job.data_root, job.device, partial))
        claims = judge(recipe.claims, outcome.measured)
        files = _data_files(outcome)
    except Exception as error:
        trace = {LOG: log.content(), TRACEBACK: traceback.format_exc().encode()}
        failed = store.publish(manifest("failed"), trace)
        error.add_note(f"The traceback is in {failed.folder / TRACEBACK}.")
        raise
    return store.publish(manifest("finished", claims), files | {LOG: log.content()}, replaces=replaces)


def _is_outdated(run: Run, job: Job, recipe: Recipe) -> bool:
    """Say whether a stored run was judged by other claims, or by other code of a user's own recipe.

    Raises:
        ConfigError: it was made by another recipe of the same name.
    """
    if run.manifest.reference != job.reference:
        raise ConfigError(
            f"Expected recipes of different names. Got {recipe.name!r} of {job.reference}, whose runs in {job.root} "
            f"are those of {run.manifest.reference}. Rename yours, or give another store with --out."
        )
    stored = [(c.id, c.sentence, c.expected, c.criterion) for c in run.manifest.claims]
    claims = [(c.id, c.sentence, c.expected, c.criterion) for c in recipe.claims]
    return stored != claims or run.manifest.environment.versions.get(_SOURCE) != _source_of(job)


def _source_of(job: Job) -> str | None:
    """Hash the file of a user's own recipe; None for a built-in one, whose version tells."""
    if job.reference.startswith("thalweg."):
        return None
    file = getattr(sys.modules.get(job.reference.partition(":")[0]), "__file__", None)
    return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else None


def _environment(job: Job) -> Environment:
    found, source = current_environment(), _source_of(job)
    return replace(found, versions=found.versions | {_SOURCE: source}) if source else found


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Run torch with a number of threads; what was set before is restored."""
    if count is None:
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _data_files(outcome: Outcome) -> dict[str, bytes]:
    for name, rows in outcome.tables.items():
        if any(isinstance(cell, dict | list) for row in plain(rows) for cell in row.values()):
            raise ConfigError(f"Expected flat rows. Got lists in a cell of table {name!r}. Use more rows.")
    files = {TABLES: table_bytes(plain(outcome.tables))}
    if outcome.arrays:
        import numpy as np
        from safetensors.numpy import save

        arrays = {name: np.asarray(value, order="C") for name, value in outcome.arrays.items()}
        kinds = {name: value.dtype for name, value in arrays.items() if value.dtype.kind not in "biuf"}
        if kinds:
            raise ConfigError(f"Expected arrays of real numbers. Got {kinds}. Store parts, or a table.")
        files[ARRAYS] = save(arrays)
    return files


def _manifest(
    job: Job,
    recipe: Recipe,
    preset: Preset,
    status: Status,
    claims: tuple[ClaimResult, ...],
    started: str,
    seconds: float,
) -> Manifest:
    parameters = preset.parameters()
    return Manifest(
        schema_version=SCHEMA_VERSION,
        id=run_id(recipe.name, recipe.version, parameters),
        recipe=recipe.name,
        reference=job.reference,
        title=recipe.title,
        source=recipe.source,
        summary=recipe.summary,
        version=recipe.version,
        preset=job.preset,
        parameters=plain(parameters),
        status=status,
        device=job.device,
        environment=_environment(job),
        started=started,
        seconds=seconds,
        command=command_line(job, recipe, preset),
        claims=claims,
        checksums={},
    )


def command_line(job: Job, recipe: Recipe, preset: Preset) -> str:
    """Word the command that regenerates a run: the preset, and what differs from it."""
    is_built_in = job.reference == recipe.name or job.reference.startswith("thalweg.")
    words = ["thalweg", "run", recipe.name if is_built_in else job.reference, job.preset]
    published = recipe.preset(job.preset).parameters()
    for name, value in preset.parameters().items():
        if value != published.get(name):
            words.append(f"{name}={json.dumps(value)}")
    if job.device != "cpu":
        words += ["--device", job.device]
    return shlex.join(words)
