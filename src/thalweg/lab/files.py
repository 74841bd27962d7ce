"""Files that are whole or absent: written aside, flushed to the disk, then renamed."""

import os
import secrets
from pathlib import Path

from thalweg.errors import StoreError


def write_flushed(path: Path, content: bytes) -> None:
    """Write a file and wait until the disk has it."""
    with path.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def flush_folder(folder: Path) -> None:
    """Wait until the disk has a folder's list of names, where the system can tell (not on Windows)."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, content: bytes) -> None:
    """Publish a file: a reader sees the old content or the new one, never a part.

    Raises:
        StoreError: the folder cannot be written, or the disk is full.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_flushed(aside, content)
        os.replace(aside, path)
        flush_folder(path.parent)
    except BaseException as error:  # Ctrl-C too leaves nothing half-written
        if aside.parent.is_dir():
            aside.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise unwritable(path, error) from error
        raise


def unwritable(path: Path, error: OSError) -> StoreError:
    """Word the failure to write at a path."""
    return StoreError(
        f"Expected a place that can be written. Got {path}: {error.strerror or error}. "
        "Free some space, or choose another place with --out."
    )
