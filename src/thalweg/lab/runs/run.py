"""One stored run: its manifest, tables, arrays and log, checked against their checksums."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from thalweg.errors import StoreError
from thalweg.lab.claims import ClaimResult
from thalweg.lab.plain import canonical
from thalweg.lab.runs.environment import Environment
from thalweg.lab.runs.identity import run_id
from thalweg.lab.tables import Table

if TYPE_CHECKING:
    import numpy as np
    from pydantic import TypeAdapter

Status = Literal["finished", "failed"]

SCHEMA_VERSION = 1
MANIFEST, TABLES, ARRAYS, LOG, TRACEBACK = (
    "manifest.json",
    "tables.json",
    "arrays.safetensors",
    "log.jsonl",
    "traceback.txt",
)


@dataclass(frozen=True)
class Manifest:
    """Everything about a run except its data.

    Args:
        schema_version: of this layout.
        id: the run's name.
        recipe: name of the recipe.
        reference: `module:NAME` of the recipe.
        title: title of the recipe.
        source: bib key and figure.
        summary: one paragraph on what the recipe shows.
        version: of the recipe's mathematics.
        preset: name of the preset that the parameters started from.
        parameters: what decided the result, the seed among it.
        status: "finished" or "failed".
        device: where tensors lived.
        environment: software and machine.
        started: when, in UTC, ISO 8601.
        seconds: how long the run took.
        command: a command line that regenerates it.
        claims: what became of the claims.
        checksums: file name -> sha256, for every other file.
        seal: sha256 of the canonical JSON of all the fields above.
    """

    schema_version: int
    id: str
    recipe: str
    reference: str
    title: str
    source: str
    summary: str
    version: int
    preset: str
    parameters: dict[str, Any]
    status: Status
    device: str
    environment: Environment
    started: str
    seconds: float
    command: str
    claims: tuple[ClaimResult, ...]
    checksums: dict[str, str]
    seal: str = ""

    def sealed(self) -> str:
        """Compute the seal."""
        fields = asdict(self)
        del fields["seal"]
        return sha256(canonical(fields).encode())

    @property
    def seed(self) -> int:
        """Seed of the run."""
        return int(self.parameters.get("seed", 0))


@dataclass(frozen=True)
class Run:
    """A stored run.

    Args:
        folder: where it lies.
        manifest: what it is.
    """

    folder: Path
    manifest: Manifest

    @property
    def id(self) -> str:
        """The run's name."""
        return self.manifest.id

    def tables(self) -> dict[str, Table]:
        """Read the tables.

        Raises:
            StoreError: the file is unreadable.
        """
        found: dict[str, Table] = json.loads(_read(self.folder / TABLES))
        return found

    def arrays(self) -> "dict[str, np.ndarray]":
        """Read the arrays; none if the run stored none.

        Raises:
            StoreError: the file is unreadable.
        """
        if ARRAYS not in self.manifest.checksums:
            return {}
        from safetensors.numpy import load

        return load(_read(self.folder / ARRAYS))


def sha256(content: bytes) -> str:
    """Give the checksum of a content."""
    return hashlib.sha256(content).hexdigest()


@cache
def _adapter() -> "TypeAdapter[Manifest]":
    from pydantic import TypeAdapter

    return TypeAdapter(Manifest)


def load_run(folder: Path) -> Run:
    """Open a stored run and check every byte of it.

    Args:
        folder: the run's folder; its name is the run's id.

    Raises:
        StoreError: a file is missing, unreadable or differs from its checksum.
    """
    from pydantic import ValidationError

    content = _read(folder / MANIFEST)
    try:
        manifest = _adapter().validate_json(content)
        is_whole = manifest.seal == manifest.sealed()
    except (ValidationError, RecursionError) as error:
        raise _damaged(folder, f"{MANIFEST} is not a manifest") from error
    if not is_whole or not content.endswith(b"}\n"):
        raise _damaged(folder, f"{MANIFEST} differs from its seal")
    identity = run_id(manifest.recipe, manifest.version, manifest.parameters)
    if not identity == manifest.id == folder.name:
        raise _damaged(folder, f"its parameters name the run {identity[:12]}")
    for name, checksum in manifest.checksums.items():
        if Path(name).name != name or sha256(_read(folder / name)) != checksum:
            raise _damaged(folder, f"{name} differs from its checksum")
    return Run(folder, manifest)


def manifest_bytes(manifest: Manifest) -> bytes:
    """Write a manifest as a file's content."""
    return json.dumps(asdict(manifest), indent=1, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def table_bytes(tables: Mapping[str, Table]) -> bytes:
    """Write plain tables as a file's content."""
    return json.dumps(tables, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _damaged(path.parent, f"{path.name}: {error.strerror or error}") from error


def _damaged(folder: Path, reason: str) -> StoreError:
    return StoreError(f"Expected a whole run. Got {folder}: {reason}. Run its recipe again; it then takes the place.")
