"""Checkpoints: state dicts on disk, read without running code and written whole or not at all."""

import json
import logging
import os
import pickle
import pickletools
import re
import secrets
import zipfile
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from thalweg.errors import CheckpointError

_LOG = logging.getLogger(__name__)

_WRAPPERS = ("state_dict", "model_state_dict", "model")
_PREFIXES = {"module.": "DataParallel", "_orig_mod.": "torch.compile"}
_PICKLED = (".pt", ".pth")
_LONGEST_HEADER = 100_000_000  # bytes; the safetensors format's own limit
_RECORD = "thalweg.json"  # metadata in the archive that torch.save writes
_SHOWN = 5  # names per list in a message; chosen by us so that it stays readable


def load_state(path: str | Path, *, trust_pickle: bool = False) -> dict[str, Tensor]:
    """Read a state dict from a safetensors file or from what `torch.save` wrote, onto the CPU.

    The content decides the format, not the suffix. A state dict inside `state_dict`, `model_state_dict` or
    `model` is found; the prefixes that DataParallel and torch.compile add are taken off, with a log line.

    Args:
        path: the file.
        trust_pickle: allow a pickle to run the code that it carries. Only for files from a trusted source.

    Returns:
        name -> tensor, in the order of the file.

    Raises:
        CheckpointError: the file is missing, unreadable, damaged or no checkpoint, needs code and
            `trust_pickle` is off, holds no state dict, or holds a weight that is not finite.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "net.safetensors"
        >>> save_state(path, {"weight": torch.ones(2)})
        >>> load_state(path)
        {'weight': tensor([1., 1.])}
    """
    path = Path(path)
    content, _ = _read(path, trust_pickle=trust_pickle)
    state = _without_prefix(_state_dict_in(path, content), path)
    _require_finite(path, state)
    return state


def load_metadata(path: str | Path) -> dict[str, str]:
    """Read the strings that `save_state` stored beside the tensors; empty where there are none.

    Args:
        path: a checkpoint of any kind that `load_state` reads.

    Returns:
        Name -> string.

    Raises:
        CheckpointError: the file is missing, unreadable, damaged, or needs code to be read.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "net.safetensors"
        >>> save_state(path, {"weight": torch.ones(2)}, {"net": "MLP"})
        >>> load_metadata(path)
        {'net': 'MLP'}
    """
    return _read(Path(path), trust_pickle=False)[1]


def save_state(path: str | Path, state: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> None:
    """Write a state dict; a reader sees the old file or the new one, never a part.

    A `.safetensors` file holds every name, so a tensor with two names is stored twice. A `.pt` or `.pth`
    file keeps such tensors tied; metadata are a record of its archive beside those of torch, which passes it
    over. Either way plain PyTorch reads a state dict.

    Args:
        path: the file; its suffix gives the format. Missing folders are made.
        state: name -> tensor, on any device.
        metadata: strings to store beside the tensors.

    Raises:
        CheckpointError: an unknown suffix, no tensors, or a place that is full or cannot be written.

    Example:
        >>> save_state("net.onnx", {"weight": torch.ones(2)})
        Traceback (most recent call last):
        thalweg.errors.CheckpointError: Expected a name ending in .safetensors, .pt or .pth. Got net.onnx. ...
    """
    path = Path(path)
    if path.suffix not in (".safetensors", *_PICKLED):
        raise CheckpointError(f"Expected a name ending in .safetensors, .pt or .pth. Got {path}. Rename the output.")
    wrong = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if wrong or not state:
        raise CheckpointError(
            f"Expected a state dict of tensors. Got {_some(wrong) if wrong else 'an empty one'}. "
            "Pass module.state_dict()."
        )
    aside = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(aside, path.suffix, state, dict(metadata or {}))
        _flush(aside)
        os.replace(aside, path)
        if os.name != "nt":
            _flush(path.parent)
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        raise CheckpointError(
            f"Expected a place that can be written. Got {path}: {_reason(error)}. "
            "Free some space, or choose another place."
        ) from error
    finally:
        if aside.parent.is_dir():
            aside.unlink(missing_ok=True)


def load_into(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy a state dict into a module, in place, casting to the module's dtype and device.

    Every name must fit, but a tied parameter may stand under any one of its names.

    Args:
        module: the module; untouched if anything does not fit.
        state: name -> tensor, as from `load_state`.

    Raises:
        CheckpointError: names are missing or unexpected, shapes differ, or the names of one tied parameter
            carry different values.

    Example:
        >>> load_into(nn.Linear(1, 2), {"weight": torch.ones(2, 1), "bias": torch.zeros(2)})
    """
    own = {name: value for name, value in module.state_dict().items() if isinstance(value, Tensor)}
    twins = _twins(own)
    missing = [name for name in own if name not in state and not any(t in state for t in twins.get(name, ()))]
    unexpected = [name for name in state if name not in own]
    mismatched = [
        f"{name} (expected {tuple(own[name].shape)}, got {tuple(state[name].shape)})"
        for name in own
        if name in state and own[name].shape != state[name].shape
    ]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": mismatched}
    told = "; ".join(f"{len(names)} {kind}: {_some(names)}" for kind, names in problems.items() if names)
    if told:
        raise CheckpointError(
            f"Expected the {len(own)} tensors of {type(module).__name__}. Got {told}. "
            "Build the module with the widths that the checkpoint was saved with."
        )
    for name, others in twins.items():
        for other in others:
            if name in state and other in state and not torch.equal(state[name], state[other]):
                raise CheckpointError(
                    f"Expected one value for the tied {name} and {other}. Got two. "
                    "Untie them in the module, or repair the checkpoint."
                )
    module.load_state_dict(dict(state), strict=False)


def _read(path: Path, *, trust_pickle: bool) -> tuple[Any, dict[str, str]]:
    """Return what the file holds, and its metadata."""
    head = _head(path)
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= _LONGEST_HEADER:
        return _read_safetensors(path)
    if head.startswith((b"PK\x03\x04", b"\x80")):
        return _read_pickle(path, trust_pickle=trust_pickle), _archived(path)
    raise CheckpointError(
        f"Expected a safetensors file or what torch.save writes. Got {path}: {_guess(head)}. "
        "Check where the file came from."
    )


def _archived(path: Path) -> dict[str, str]:
    """Read the metadata that `save_state` put into torch's archive; empty where there are none."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [n for n in archive.namelist() if n.endswith(f"/{_RECORD}")]
            found = json.loads(archive.read(names[0])) if names else {}
    except (OSError, ValueError, zipfile.BadZipFile):
        return {}
    is_ours = isinstance(found, dict) and all(isinstance(v, str) for v in found.values())
    return found if is_ours else {}


def _head(path: Path) -> bytes:
    if path.is_dir():
        inside = sorted(p.name for p in path.iterdir() if p.suffix in (".safetensors", *_PICKLED))
        hint = f"Name a file in it: {_some(inside)}." if inside else "Name a file."
        raise CheckpointError(f"Expected a checkpoint file. Got the folder {path}. {hint}")
    try:
        with path.open("rb") as stream:
            head = stream.read(512)
    except OSError as error:
        raise CheckpointError(f"Expected a checkpoint file. Got {path}: {_reason(error)}. Check the path.") from error
    if not head:
        raise CheckpointError(f"Expected a checkpoint file. Got {path}, which is empty. Copy or download it again.")
    return head


def _guess(head: bytes) -> str:
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page, as a failed download leaves it"
    if text.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer without its content"
    return "bytes of another kind"


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safetensors.safe_open(path, framework="pt") as stream:
            metadata = stream.metadata() or {}
        return load_file(path), dict(metadata)
    except (OSError, RuntimeError, ValueError, safetensors.SafetensorError) as error:
        raise _damaged(path, error) from error


def _read_pickle(path: Path, *, trust_pickle: bool) -> Any:
    try:
        with path.open("rb") as stream:
            return torch.load(stream, map_location="cpu", weights_only=not trust_pickle)
    except pickle.UnpicklingError as error:
        if trust_pickle or "unsupported" not in str(error).lower() or not _is_whole(path):
            raise _damaged(path, error) from error
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise CheckpointError(
            f"Expected a checkpoint of tensors only. Got {path}, a pickle that runs code when it is read"
            f"{f' ({found[1]})' if found else ''}. Save its state dict as safetensors; "
            "or, if you trust whoever made it, add --trust-pickle."
        ) from error
    except Exception as error:  # a damaged or a foreign pickle can fail in any way at all
        raise _damaged(path, error) from error


def _is_whole(path: Path) -> bool:
    """Tell whether the pickles at the start of a file end; they are scanned, not run.

    The old format of `torch.save` is four pickles, then raw data. A name cut short by the end of the file
    looks like a forbidden one, and nobody should be told to trust it.
    """
    with path.open("rb") as stream:
        if stream.peek(2)[:2] == b"PK":
            return True
        try:
            for _ in range(4):
                deque(pickletools.genops(stream), maxlen=0)
                if not stream.peek(1):
                    break
        except ValueError:
            return False
    return True


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"Expected a whole checkpoint. Got {path}, which is damaged or cut short ({_reason(error)}). "
        "Copy or download it again."
    )


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:120].rstrip('. ')}" if lines else type(error).__name__


def _state_dict_in(path: Path, content: Any) -> dict[str, Tensor]:
    if isinstance(content, nn.Module):
        content = content.state_dict()
    if isinstance(content, Mapping):
        if content and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items()):
            return {name: value.detach() for name, value in content.items()}
        for wrapper in _WRAPPERS:
            if isinstance(content.get(wrapper), Mapping | nn.Module):
                return _state_dict_in(path, content[wrapper])
        names = [f"{k} ({type(v).__name__})" for k, v in content.items() if not isinstance(v, Tensor)]
        got = f"a dict with {_some(names)}" if names else "an empty dict" if not content else "a dict"
    else:
        got = f"a {type(content).__name__}"
    raise CheckpointError(
        f"Expected a state dict, names and tensors. Got {path}, which holds {got}. "
        f"Save module.state_dict(), alone or under one of {', '.join(_WRAPPERS)}."
    )


def _without_prefix(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    for prefix, origin in _PREFIXES.items():
        if all(name.startswith(prefix) and name != prefix for name in state):
            _LOG.info("took the prefix %r of %s off the names in %s", prefix, origin, path)
            stripped = {name.removeprefix(prefix): value for name, value in state.items()}
            return _without_prefix(stripped, path)
    return state


def _require_finite(path: Path, state: Mapping[str, Tensor]) -> None:
    bad = [name for name, value in state.items() if not _is_finite(value)]
    if bad:
        raise CheckpointError(
            f"Expected finite weights. Got {path} with NaN or infinity in {_some(bad)}. "
            "The training diverged: take an earlier checkpoint."
        )


def _is_finite(value: Tensor) -> bool:
    if value.is_floating_point() and value.element_size() == 1:  # float8 has no isfinite
        value = value.float()
    return bool(torch.isfinite(value).all())


def _write(aside: Path, suffix: str, state: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    if suffix == ".safetensors":
        save_file(_owned(state, keep_tied=False), aside, metadata=metadata)
        return
    owned = _owned(state, keep_tied=True)
    with aside.open("wb") as stream:
        torch.save(owned, stream)
    if metadata:
        with zipfile.ZipFile(aside, "a", zipfile.ZIP_STORED) as archive:
            folder = archive.namelist()[0].partition("/")[0]
            archive.writestr(f"{folder}/{_RECORD}", json.dumps(metadata))


def _owned(state: Mapping[str, Tensor], *, keep_tied: bool) -> dict[str, Tensor]:
    """Give every tensor a storage of exactly its own size; tied ones share it if asked to."""
    owned: dict[str, Tensor] = {}
    seen: dict[Any, Tensor] = {}
    storages: set[int] = set()
    for name, value in state.items():
        key = _identity(value)
        if keep_tied and key in seen:
            owned[name] = seen[key]
            continue
        kept = value.detach().cpu().contiguous()
        storage = kept.untyped_storage()
        if storage.data_ptr() in storages or storage.nbytes() != kept.numel() * kept.element_size():
            kept = kept.clone()
        storages.add(kept.untyped_storage().data_ptr())
        owned[name] = seen[key] = kept
    return owned


def _identity(value: Tensor) -> Any:
    """Two tensors with one identity are one tensor under two names."""
    if value.numel() == 0:
        return object()
    return value.device, value.data_ptr(), value.shape, value.stride(), value.dtype


def _twins(state: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Return the other names of every tensor that has several."""
    names: dict[Any, list[str]] = {}
    for name, value in state.items():
        names.setdefault(_identity(value), []).append(name)
    return {name: [o for o in group if o != name] for group in names.values() for name in group if group[1:]}


def _flush(path: Path) -> None:
    """Wait until the disk has a file, or a folder's list of names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
