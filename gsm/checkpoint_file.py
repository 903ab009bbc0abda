"""Checkpoint files: written whole or not at all, read without running anything that is in them.

* Writing: to a temporary file in the same directory, flushed to the disk, read back, then renamed over the old one. A
  crash at any moment leaves the old checkpoint or the new one.
* Reading: checksums first, then ``weights_only=True``: tensors and plain values, no code. A half-written, corrupted or
  hostile file is an error that names the file and changes nothing.
"""

from __future__ import annotations

import os
import pickle
import tempfile
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or read, or that belongs to another run; the message says which and why."""


def plain(value: Any) -> Any:
    """``value`` with numpy scalars as Python numbers: ``weights_only`` loading refuses the former."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return tuple(plain(v) for v in value)
    if isinstance(value, list | tuple):
        return type(value)(plain(v) for v in value)
    if type(value) is dict:
        return {plain(k): plain(v) for k, v in value.items()}
    return value


def _save(state: Mapping[str, Any], file: Any, **torch_save_kwargs: Any) -> None:
    try:
        torch.save(dict(state), file, **torch_save_kwargs)
    except RuntimeError as error:  # how torch.save says that a write failed
        raise CheckpointError(f"the checkpoint could not be written as a whole (is the disk full?): {error}") from error


def write(path: Any, state: Mapping[str, Any], **torch_save_kwargs: Any) -> None:
    """Write ``state`` to ``path`` atomically; a file object is written to directly.

    Args:
        path: file name, or a binary file object.
        state: tensors and plain values, nested.
        torch_save_kwargs: for ``torch.save``.

    Raises:
        CheckpointError: something in ``state`` could not be loaded again, or not everything could be written; a file of
            this name is as it was then.
    """
    if hasattr(path, "write"):
        _save(state, path, **torch_save_kwargs)
        return
    target = Path(os.fspath(path))
    if target.exists() and not target.is_file():
        raise CheckpointError(f"{target} is no regular file: the checkpoint would take its place. Choose another path.")
    descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as file:
            _save(state, file, **torch_save_kwargs)
            file.flush()
            os.fsync(file.fileno())
        read(temporary)
        os.replace(temporary, target)
    except CheckpointError as error:
        raise CheckpointError(f"nothing was written to {target}: {error}") from error
    finally:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
    _sync_directory(target.parent)


def _sync_directory(directory: Path) -> None:
    """Make the rename itself durable, where the operating system lets a directory be opened."""
    with suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read(path: Any, **torch_load_kwargs: Any) -> dict[str, Any]:
    """Read a checkpoint: ours or Opacus's, checksums verified, no code run.

    Args:
        path: file name, or a binary file object.
        torch_load_kwargs: for ``torch.load``; ``weights_only=False`` runs whatever the file says, for files whose
            author you trust.

    Raises:
        FileNotFoundError: no such file.
        TypeError: neither a name nor a file.
        CheckpointError: half-written, corrupted, not a checkpoint, or with objects other than tensors and plain values.
    """
    if not isinstance(path, str | os.PathLike) and not hasattr(path, "read"):
        raise TypeError(f"a checkpoint's path is a file name or a binary file object, got {path!r}")
    name = str(path) if isinstance(path, str | os.PathLike) else f"the {type(path).__name__}"
    _verify_checksums(path, name)
    try:
        state = torch.load(path, **{"weights_only": True, **torch_load_kwargs})
    except FileNotFoundError:
        raise
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{name} holds objects other than tensors and plain values; loading them could run code, so they are not: "
            f"{_first_line(error)} If you trust whoever wrote it: torch_load_kwargs={{'weights_only': False}}."
        ) from error
    except (RuntimeError, EOFError, ValueError, LookupError, OSError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{name} is not a readable checkpoint: {_first_line(error)}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{name} holds a {type(state).__name__}, not a checkpoint's dict")
    return state


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    named = [line for line in lines if "GLOBAL" in line or "Unsupported" in line]
    return (named or lines or [type(error).__name__])[0]


def _verify_checksums(path: Any, name: str) -> None:
    """Check every part of the archive against its CRC-32: torch itself would load flipped bits as numbers."""
    start = path.tell() if hasattr(path, "tell") else None
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except zipfile.BadZipFile:
        damaged = None  # cut off, damaged, or torch's old format without checksums: torch.load will tell
        if zipfile.is_zipfile(path):
            raise CheckpointError(f"{name} is corrupted: its table of contents is damaged") from None
    finally:
        if start is not None:
            path.seek(start)
    if damaged is not None:
        raise CheckpointError(f"{name} is corrupted: the checksum of {damaged} does not match its contents")
