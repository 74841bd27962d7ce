"""The store: a folder of runs, each whole or absent.

    objects/ab/<id>/   finished runs         failed/<id>/   the last failure of a run, with its traceback
    partial/<id>/      what an interrupted run goes on from     reports/   HTML reports
    aside/tmp-*/       being written; removed when a day old

A run is written aside, flushed to the disk and published by renaming its folder, so that `kill -9` at any
moment corrupts nothing, and of several writers of one id exactly one publishes.
"""

import contextlib
import errno
import os
import secrets
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from thalweg.errors import StoreError
from thalweg.lab.files import flush_folder, unwritable, write_flushed
from thalweg.lab.runs.run import MANIFEST, Manifest, Run, load_run, manifest_bytes, sha256

DEFAULT_FOLDER = "thalweg-runs"
ENVIRONMENT_VARIABLE = "THALWEG_RUNS"
_ASIDE = "aside"  # where runs are written before they are renamed; nothing outside it is ever cleaned
_STALE_SECONDS = 24 * 3600  # our choice: no run writes its few files for a day


@dataclass(frozen=True)
class Listing:
    """What lies in a store.

    Args:
        runs: finished runs, oldest first.
        failed: failed runs, oldest first.
        damaged: one sentence per damaged object, which is skipped.
    """

    runs: tuple[Run, ...]
    failed: tuple[Run, ...]
    damaged: tuple[str, ...]


@dataclass(frozen=True)
class Store:
    """A folder of runs.

    Args:
        root: the folder; made when the first run is written.
    """

    root: Path

    @property
    def reports(self) -> Path:
        """Folder of the reports."""
        return self.root / "reports"

    def find(self, id: str) -> Run | None:  # noqa: A002 - the field's word
        """Give the finished run of that id, or None if there is none.

        Raises:
            StoreError: it is there but damaged.
        """
        folder = self._place(id)
        return load_run(folder) if folder.exists() else None

    def search(self, start: str) -> Run:
        """Give the one finished run whose id starts with the given digits.

        Raises:
            StoreError: no run, or more than one, or a damaged one.
        """
        found = [f for f in self._folders("objects/*/*") if f.name.startswith(start)]
        if len(found) != 1:
            raise StoreError(
                f"Expected the first digits of one run's id. Got {start!r}, which {len(found)} runs in "
                f"{self.root} have. See `thalweg runs`."
            )
        return load_run(found[0])

    def runs(self) -> Listing:
        """List what is there; damaged objects are skipped and named."""
        damaged: list[str] = []
        finished = self._loaded("objects/*/*", damaged)
        failed = self._loaded("failed/*", damaged)
        return Listing(finished, failed, tuple(damaged))

    def prepare(self) -> None:
        """Make the folder, see that it can be written, and remove what killed writers left a day ago.

        Raises:
            StoreError: the folder cannot be written.
        """
        with self._aside():
            pass
        for leftover in (self.root / _ASIDE).glob("tmp-*"):
            with contextlib.suppress(OSError):  # another process may remove it first
                if time.time() - leftover.stat().st_mtime > _STALE_SECONDS:
                    shutil.rmtree(leftover)

    def partial(self, id: str) -> Path:  # noqa: A002 - the field's word
        """Folder in which a run under way may keep what it needs to go on; removed when it is published."""
        return self.root / "partial" / id

    def publish(self, manifest: Manifest, files: Mapping[str, bytes], *, replaces: bool = False) -> Run:
        """Write a run and make it visible in one step.

        Args:
            manifest: the run; its checksums and seal are filled in here.
            files: name -> content of every other file.
            replaces: take the place of a run of the same id. Without it, the run that is there stays.

        Returns:
            The run that is now in the store.

        Raises:
            StoreError: the folder cannot be written, or the disk is full; nothing half-written is left.
        """
        if manifest.status == "failed":
            target, replaces = self.root / "failed" / manifest.id, True
        else:
            target = self._place(manifest.id)
        with self._aside() as aside:
            self._write(aside, manifest, files)
            target.parent.mkdir(parents=True, exist_ok=True)
            self._rename(aside, target, replaces)
            flush_folder(target.parent)
            if manifest.status == "finished":
                shutil.rmtree(self.root / "failed" / manifest.id, ignore_errors=True)
                self._remove(self.partial(manifest.id))
        return load_run(target)

    @staticmethod
    def _write(aside: Path, manifest: Manifest, files: Mapping[str, bytes]) -> None:
        for name, content in files.items():
            write_flushed(aside / name, content)
        manifest = replace(manifest, checksums={name: sha256(content) for name, content in files.items()})
        write_flushed(aside / MANIFEST, manifest_bytes(replace(manifest, seal=manifest.sealed())))
        flush_folder(aside)

    def _rename(self, aside: Path, target: Path, replaces: bool) -> None:
        """Rename a folder; of several writers the first wins, unless the new one is to replace it."""
        while True:
            try:
                os.rename(aside, target)
                return
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
            if not replaces:
                return
            old = self._temporary()
            with contextlib.suppress(FileNotFoundError):  # another writer may have replaced it first
                os.rename(target, old)
            shutil.rmtree(old, ignore_errors=True)

    def _remove(self, folder: Path) -> None:
        """Remove a folder in which another process may write: it is out of sight first."""
        aside = self._temporary()
        with contextlib.suppress(OSError):
            aside.parent.mkdir(parents=True, exist_ok=True)
            os.rename(folder, aside)
        shutil.rmtree(aside, ignore_errors=True)

    @contextlib.contextmanager
    def _aside(self) -> Iterator[Path]:
        """Make a folder to write in, and remove what is left of it afterwards."""
        aside = self._temporary()
        try:
            aside.mkdir(parents=True)
            yield aside
        except OSError as error:
            raise unwritable(self.root, error) from error
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def _temporary(self) -> Path:
        return self.root / _ASIDE / f"tmp-{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"

    def _place(self, id: str) -> Path:  # noqa: A002 - the field's word
        return self.root / "objects" / id[:2] / id

    def _folders(self, pattern: str) -> list[Path]:
        return sorted(f for f in self.root.glob(pattern) if f.is_dir())

    def _loaded(self, pattern: str, damaged: list[str]) -> tuple[Run, ...]:
        runs = []
        for folder in self._folders(pattern):
            try:
                runs.append(load_run(folder))
            except StoreError as error:
                damaged.append(str(error))
        return tuple(sorted(runs, key=lambda run: (run.manifest.started, run.id)))


def store_at(folder: Path | None = None) -> Store:
    """Open the store at a folder; default: the environment's THALWEG_RUNS, else ./thalweg-runs."""
    return Store(folder or Path(os.environ.get(ENVIRONMENT_VARIABLE) or DEFAULT_FOLDER))
