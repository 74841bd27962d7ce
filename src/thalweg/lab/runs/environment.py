"""Where a run was made: versions, commit, machine. Nothing heavy is imported to find out."""

import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path

_RECORDED = ("thalweg", "torch", "numpy", "scipy", "scikit-learn", "pydantic", "plotly")
_DEPTH = 4  # of this file below the checkout: src/thalweg/lab/runs


@dataclass(frozen=True)
class Environment:
    """The software and the machine of a run.

    Args:
        versions: package -> version, thalweg and Python among them.
        commit: git commit of thalweg's source, if it runs from a checkout.
        platform: operating system and architecture.
        hardware: processor, number of cores, accelerators.
    """

    versions: dict[str, str]
    commit: str | None
    platform: str
    hardware: dict[str, str]


def current_environment() -> Environment:
    """Describe this process's software and machine."""
    import importlib.metadata  # it takes long to load, and only a run that is made needs it

    versions = {"python": platform.python_version()}
    for package in _RECORDED:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return Environment(versions, _commit(Path(__file__).resolve().parents[_DEPTH]), platform.platform(), _hardware())


def _commit(checkout: Path) -> str | None:
    """Read the commit off a checkout's own files, so that git need not be installed."""
    folder = checkout / ".git"
    try:
        if folder.is_file():  # a linked work tree: the file names the folder
            folder = (checkout / folder.read_text().removeprefix("gitdir:").strip()).resolve()
        head = (folder / "HEAD").read_text().strip()
        if not head.startswith("ref:"):
            return head
        reference = head.removeprefix("ref:").strip()
        pointer = folder / "commondir"
        shared = (folder / pointer.read_text().strip()).resolve() if pointer.exists() else folder
        if (shared / reference).exists():
            return (shared / reference).read_text().strip()
        packed = (shared / "packed-refs").read_text()
    except (OSError, UnicodeDecodeError):
        return None
    found = re.search(rf"^([0-9a-f]{{40,64}}) {re.escape(reference)}$", packed, re.MULTILINE)
    return found.group(1) if found else None


def _hardware() -> dict[str, str]:
    found = {"processor": _processor(), "cores": str(os.cpu_count() or 1)}
    cards = []
    for card in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        model = re.search(r"Model:\s*(.+)", card.read_text())
        cards.append(model.group(1).strip() if model else "NVIDIA")
    if cards:
        found["accelerators"] = ", ".join(cards)
    return found


def _processor() -> str:
    try:
        match = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        match = None
    return match.group(1).strip() if match else platform.processor() or platform.machine()
