"""Files that are there whole or not at all, of tensors, numbers and text; what they hold is `checkpoints`.

A file is what ``torch.save`` writes, a zip; its comment says version and SHA-256 of all before the digest::

    torch.load(path, weights_only=True)     # reads it anywhere, without halfstep

It is written beside its place and moved there when the disk has it, so a process killed at any time leaves
the old file or the new one. Reading checks the digest before anything is interpreted, and never runs code.
"""

from __future__ import annotations

import collections
import contextlib
import fcntl
import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from halfstep.errors import CheckpointError

__all__ = ["read_file", "write_file"]

_VERSION = 1
# At the end of every version's files, for ever: so that an older halfstep can say that it is too old.
_COMMENT = "halfstep checkpoint, version {:08d}, sha256 "
_DIGEST = 64
_TAIL = len(_COMMENT.format(0)) + _DIGEST
_CHUNK = 1 << 20
_ZIP = b"PK\x03\x04"
# Python's own types that torch's loader of weights takes; no subclass of them but torch's and collections'.
_SCALARS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
_MAPS = (dict, collections.OrderedDict, collections.Counter)
_LISTS = (list, tuple, set, torch.Size)
_INT_BITS = 2000


def write_file(path: Path, content: dict[str, Any]) -> None:
    """Have ``content`` at ``path``, whole or not at all, and on the disk when this returns.

    Tensors of any dtype and device, numbers, text, and lists, tuples, sets and dicts of them. Writes
    ``.NAME.partial`` in the same folder, syncs it, and renames it; what a killed process left of one is
    overwritten by the next call.

    Raises:
        CheckpointError: ``content`` holds anything else, or another process is writing this file.
        OSError: the folder cannot be written to, or the disk is full; the old file is as it was.
    """
    content = _plain(content, "content")
    path = path.resolve()  # a link stays a link to the file that is replaced
    partial = path.with_name(f".{path.name}.partial")
    with _locked(partial, path) as file:
        file.truncate(0)
        try:
            torch.save(content, file)
            _sign(file)
            file.flush()
            os.fsync(file.fileno())
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name, too
    finally:
        os.close(folder)


def read_file(path: Path) -> dict[str, Any]:
    """What `write_file` was given, on the CPU, after its digest was found right.

    Raises:
        CheckpointError: the file was cut short or altered, is no checkpoint, or of a newer version.
        OSError: it cannot be opened.
    """
    with path.open("rb") as file:
        version = _checked(file, path)
        if version > _VERSION:
            raise CheckpointError(
                f"{path} is a checkpoint of version {version}; this halfstep reads version {_VERSION} and "
                "older. Update halfstep"
            )
        file.seek(0)
        return torch.load(file, map_location="cpu", weights_only=True)


@contextlib.contextmanager
def _locked(partial: Path, path: Path) -> Iterator[IO[bytes]]:
    """``partial``, open for this process alone; the lock goes with the process, whatever ends it."""
    descriptor = os.open(partial, os.O_RDWR | os.O_CREAT, 0o666)
    with os.fdopen(descriptor, "r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = os.fstat(descriptor).st_ino == partial.stat().st_ino  # else: renamed meanwhile
        except (BlockingIOError, FileNotFoundError):
            mine = False
        if not mine:
            raise CheckpointError(
                f"another process is writing {path} at this moment: give each its own file. Of the processes "
                "of one distributed run call save on all; the first one writes"
            )
        yield file


def _sign(file: IO[bytes]) -> None:
    """Put version and digest in the comment of the zip that ``file`` is."""
    file.seek(-2, os.SEEK_END)  # the length of the comment, 0 so far
    file.write(_TAIL.to_bytes(2, "little") + _COMMENT.format(_VERSION).encode())
    digest = _digest(file, file.tell())
    file.seek(0, os.SEEK_END)
    file.write(digest.encode())


def _digest(file: IO[bytes], size: int) -> str:
    sha = hashlib.sha256()
    file.seek(0)
    while size:
        chunk = file.read(min(size, _CHUNK))
        if not chunk:
            break
        sha.update(chunk)
        size -= len(chunk)
    return sha.hexdigest()


def _checked(file: IO[bytes], path: Path) -> int:
    """The version of a checkpoint that is whole."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(size - _TAIL, 0))
    tail = file.read()
    file.seek(0)
    if file.read(len(_ZIP)) != _ZIP and b"halfstep checkpoint" not in tail:
        raise CheckpointError(
            f"{path} ({size} bytes) is no checkpoint of halfstep: it does not begin as one. Give a file that "
            "switch.save wrote; for files of torch.save use torch.load and load_state_dict"
        )
    found = re.fullmatch(rb"halfstep checkpoint, version (\d{8}), sha256 ([0-9a-f]{64})", tail)
    if found is None:
        raise CheckpointError(
            f"{path} ({size} bytes) does not end as a checkpoint of halfstep: it was cut short or altered, "
            "or another program wrote it. Resume from an older one"
        )
    if _digest(file, size - _DIGEST) != found[2].decode():
        raise CheckpointError(
            f"{path} ({size} bytes) was altered after it was written: its SHA-256 is not the one that it "
            "says. Resume from an older one"
        )
    return int(found[1])


def _plain(value: Any, where: str) -> Any:
    """``value`` as plain data, a tensor by itself, numpy's numbers as Python's; an error says where."""
    if isinstance(value, Tensor):
        return _bare(value, where)
    if isinstance(value, np.generic):
        return _plain(value.item(), where)
    kind = type(value)
    if kind is int and value.bit_length() > _INT_BITS:
        raise CheckpointError(
            f"{where} is an int of {value.bit_length()} bits; at most {_INT_BITS}"
        )
    if kind in _SCALARS:
        return value
    if kind in _MAPS:
        kept = kind({k: _plain(v, f"{where}[{k!r}]") for k, v in value.items()})
        for k in kept:
            if type(k) not in _SCALARS:
                raise CheckpointError(
                    f"{where} has the key {k!r}, a {type(k).__name__}; numbers and text may be"
                )
        if hasattr(value, "_metadata"):  # of a state_dict: the versions of its modules
            setattr(kept, "_metadata", _plain(value._metadata, where))  # noqa: B010
        return kept
    if kind in _LISTS:
        return kind([_plain(v, f"{where}[{k}]") for k, v in enumerate(value)])
    raise CheckpointError(
        f"{where} is a {kind.__module__}.{kind.__qualname__}: a checkpoint holds tensors, numbers and text, "
        "and lists, tuples, sets and dicts of them, so that no code runs when it is read. Save what it is "
        "made of (its state_dict(), a torch.from_numpy() of it)"
    )


def _bare(tensor: Tensor, where: str) -> Tensor:
    if type(tensor) not in (Tensor, torch.nn.Parameter):
        raise CheckpointError(
            f"{where} is a {type(tensor).__name__}: a checkpoint holds plain tensors. Save what it is made of"
        )
    tensor = tensor.detach()
    if tensor.layout is not torch.strided:
        return tensor
    # torch.save writes the whole storage, of which a slice may be a small part.
    whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if whole else tensor.clone()
