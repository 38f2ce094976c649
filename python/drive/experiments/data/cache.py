"""Decoded images, kept once as uint8 tensors in a folder outside of every project.

A source is known by the names, sizes and times of its files: 60,000 of them are looked at in a second, and
decoded in half a minute. One that has changed is decoded again; the tensors of the old one stay until the
cache folder is emptied.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields
from pathlib import Path

import safetensors
import safetensors.torch

from .dataset import Dataset

DECODER = "3"  # changes with what `imagefolder` makes of the same files
_TENSORS = ("train_x", "train_y", "test_x", "test_y")


def cache_folder() -> Path:
    """Where data go that can be made again: $XDG_CACHE_HOME/drive-prune, by default in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "drive-prune"


def cached(source: Path, side: int | None, decode: Callable[[Path, int | None], Dataset]) -> Dataset:
    """What `decode` makes of a folder or file, from the cache if it is there; a cache may fail unnoticed."""
    if not source.exists():
        return decode(source, side)
    path = cache_folder() / f"{source.name.partition('.')[0]}-{_fingerprint(source, side)}.safetensors"
    found = _read(path)
    if found is None:
        found = decode(source, side)
        _write(path, found)
    return found


def _fingerprint(source: Path, side: int | None) -> str:
    """A digest of the names, sizes and modification times of a file, or of all files of a folder."""
    digest = hashlib.blake2b(f"{DECODER} {side}\0".encode(), digest_size=12)
    for path in _files(source):
        found = path.stat()
        digest.update(f"{path.relative_to(source)}\0{found.st_size}\0{found.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _files(source: Path) -> list[Path]:
    if source.is_file():
        return [source]
    return sorted(Path(folder, name) for folder, _, names in os.walk(source) for name in names)


def _read(path: Path) -> Dataset | None:
    """None: there is no such file, or it is broken."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            rest = json.loads(file.metadata()["dataset"])
            tensors = {name: file.get_tensor(name) for name in _TENSORS}
        return Dataset(**tensors, **{**rest, "skipped": tuple(rest["skipped"])})
    except (OSError, safetensors.SafetensorError, ValueError, KeyError, TypeError):
        return None


def _write(path: Path, data: Dataset) -> None:
    rest = {field.name: getattr(data, field.name) for field in fields(data) if field.name not in _TENSORS}
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # not by way of bytes: ImageNet at 32x32 has 4 GB
        safetensors.torch.save_file(
            {name: getattr(data, name) for name in _TENSORS}, partial, {"dataset": json.dumps(rest)}
        )
        os.replace(partial, path)
    except (OSError, safetensors.SafetensorError):  # no place, or not writable: decoded again next time
        with suppress(OSError):
            partial.unlink()
