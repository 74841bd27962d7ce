"""How much memory there is, asked before anything large is made."""

import os
from pathlib import Path

import torch


def available_memory(device: torch.device) -> int | None:
    """Give the bytes that a device has free; None where the system does not tell.

    On a CPU: what Linux estimates to be available without swapping, and no more than a container's limit leaves.

    Args:
        device: where the tensors are to live.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu":
        return None
    found = [size for size in (_of_linux(), _of_container()) if size is not None]
    if found:
        return min(found)
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def worded_bytes(count: int) -> str:
    """Word a number of bytes: 442.4 MB."""
    size, unit = float(count), "bytes"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{count} bytes" if unit == "bytes" else f"{size:.1f} {unit}"


def _of_linux() -> int | None:
    try:
        rows = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(int(row.split()[1]) * 1024 for row in rows if row.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError, IndexError):
        return None


def _of_container() -> int | None:
    """Read what the control groups that this process is in leave, files that can be dropped not counted (Linux)."""
    try:
        rows = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
        own = next((row[3:].strip("/") for row in rows if row.startswith("0::")), "")
    except OSError:
        return None
    root, found = Path("/sys/fs/cgroup"), []
    for folder in (root / own, *(root / own).parents):
        if not folder.is_relative_to(root):
            break
        try:
            limit = int((folder / "memory.max").read_text(encoding="ascii"))
            used = int((folder / "memory.current").read_text(encoding="ascii"))
            stat = dict(row.split() for row in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
            found.append(max(0, limit - used + int(stat.get("inactive_file", 0))))
        except (OSError, ValueError):
            continue
    return min(found, default=None)
