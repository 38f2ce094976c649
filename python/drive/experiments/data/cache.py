"""Decoded images, kept once as uint8 tensors in a folder outside of every project.

A source is known by its real path and by the names, sizes and times of its images, wherever links lead:
60,000 of them are looked at in a second, and decoded in half a minute. One that has changed is decoded again;
the tensors of the old one stay until the cache folder is emptied.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import fields
from pathlib import Path

import safetensors
import safetensors.torch

from drive.experiments.runs.inputs import require
from drive.files import atomic

from .dataset import Dataset

DECODER = "4"  # changes with what `imagefolder` makes of the same files
_TENSORS = ("train_x", "train_y", "test_x", "test_y")


def cache_folder() -> Path | None:
    """Where data go that can be made again: $XDG_CACHE_HOME/drive-prune, by default in ~/.cache.

    None: there is no home, as for a user whom the system does not know.
    """
    with suppress(RuntimeError):
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "drive-prune"
    return None


def cached(source: Path, about: object, files: Iterable[Path], decode: Callable[[], Dataset]) -> Dataset:
    """What `decode` makes of a folder or file, from the cache if it is there; a cache may fail unnoticed.

    Args:
        source: its real path.
        about: what the result depends on besides the files, by its repr.
        files: that are decoded, and the folders that hold them.

    Raises:
        OSError: a file that is not there.
    """
    folder = cache_folder()
    if folder is None:
        return decode()
    name = re.sub(r"[^\w-]", "_", source.name.partition(".")[0])[:40]  # for people who look there
    path = folder / f"{name}-{_fingerprint(about, files)}.safetensors"
    found = _read(path)
    if found is None:
        found = decode()
        _write(path, found)
    return found


def _fingerprint(about: object, files: Iterable[Path]) -> str:
    digest = hashlib.blake2b(digest_size=12)
    digest.update(repr((DECODER, require("PIL").__version__, about)).encode())
    for path in files:
        target = os.path.realpath(path) if os.path.islink(path) else None
        found = os.stat(path)
        # ctime, too: copies and archives set the other one, and images without compression are of one size
        state = os.fspath(path), target, found.st_size, found.st_mtime_ns, found.st_ctime_ns
        digest.update(f"{state!r}\n".encode())
    return digest.hexdigest()


def _read(path: Path) -> Dataset | None:
    """None: there is no such file, or it is broken."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in _TENSORS}
        rest = json.loads(metadata["dataset"])
        found = Dataset(**tensors, **{**rest, "skipped": tuple(map(tuple, rest["skipped"]))})
        return found if metadata["digest"] == _digest(found) else None
    except Exception:  # whatever comes of damaged bytes
        return None


def _write(path: Path, data: Dataset) -> None:
    rest = {field.name: getattr(data, field.name) for field in fields(data) if field.name not in _TENSORS}
    with suppress(OSError, safetensors.SafetensorError):  # no place, or not writable: decoded again next time
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic(path) as partial:
            # not by way of bytes: ImageNet at 32x32 has 4 GB
            safetensors.torch.save_file(
                {name: getattr(data, name) for name in _TENSORS},
                partial,
                {"dataset": json.dumps(rest), "digest": _digest(data)},
            )


def _digest(data: Dataset) -> str:
    """Of all that is kept: a disk may give back other bytes than it was given. A second for each GB."""
    rest = data.classes, data.augment, data.skipped, data.fingerprint
    return hashlib.blake2b(repr(rest).encode(), digest_size=16).hexdigest()
