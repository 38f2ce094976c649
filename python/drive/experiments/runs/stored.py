"""What runs keep in files, and read again whatever became of these files meanwhile.

What a run goes on from is stamped: with the version of its format, and a checksum of what it says. So a file
that was damaged, changed by hand or made by another version is told, and no number comes of it.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from drive.files import check_regular, write_atomic

from .inputs import InputError, one_line

CHECKPOINT = "drive.checkpoint.v1"


@contextmanager
def reading(path: Path, expected: str, remedy: str = "", argument: str = "") -> Iterator[None]:
    """What goes wrong inside becomes an InputError: `path must be expected, got ...: remedy`.

    Whatever it is: decoders raise nearly everything for files that are not theirs, or too deep, or too large.

    Args:
        argument: the option that named the path: `argument must be expected, got path (...)`.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        why = "no such file" if isinstance(error, FileNotFoundError) else one_line(error)
        if argument:
            raise InputError(f"{argument} must be {expected}, got {path} ({why})") from error
        raise InputError(f"{path} must be {expected}, got {why}: {remedy}") from error


def write_json(path: Path, value: Any) -> None:
    """`write_atomic` of indented JSON."""
    write_atomic(path, (json.dumps(value, indent=2) + "\n").encode())


def read_json(path: Path) -> Any:
    """What `write_json` wrote; raises whatever comes of another file."""
    check_regular(path)  # a pipe would never end
    return json.loads(path.read_bytes())


def write_stamped(path: Path, format: str, value: dict[str, Any]) -> None:
    """`write_json` with a stamp, for `read_stamped`."""
    plain = json.loads(json.dumps(value))  # as it will be read: tuples are lists, all keys are text
    write_json(path, {"format": format, **plain, "checksum": _checksum(format, plain)})


def read_stamped(path: Path, format: str, remedy: str) -> dict[str, Any]:
    """What `write_stamped` wrote.

    Args:
        format: that was given there.
        remedy: what to do if it cannot be read.

    Raises:
        InputError: it is not what was written.
    """
    with reading(path, f"a file of the format {format}", remedy):
        found = read_json(path)
        if not isinstance(found, dict) or "format" not in found:
            raise ValueError("one without a format")
        if (other := found.pop("format")) != format:
            raise ValueError(f"the format {other!r}")
        if found.pop("checksum", None) != _checksum(format, found):
            raise ValueError("one that was damaged or changed")
    return found


def save_tensors(path: Path, value: dict[str, Any]) -> None:
    """`write_atomic` of torch.save."""
    buffer = io.BytesIO()
    torch.save({**value, "format": CHECKPOINT}, buffer)
    write_atomic(path, buffer.getvalue())


def load_tensors(path: Path, argument: str = "") -> dict[str, Any]:
    """What `save_tensors` wrote, on the CPU; or any checkpoint with the entry "model".

    Args:
        argument: the option that named the path.

    Raises:
        InputError: no such file, or not a checkpoint.
    """
    with reading(path, "a checkpoint file", AGAIN, argument):
        check_regular(path)
        value = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(value, dict) or not isinstance(value.get("model"), dict):
            raise ValueError("there is no entry 'model'")
        if (format := value.pop("format", CHECKPOINT)) != CHECKPOINT:  # those of others have none
            raise ValueError(f"its format is {format!r}")
    return value


AGAIN = "delete it, and its work is done again"


def digest_of(path: Path) -> str:
    """A checksum of a file's bytes."""
    with path.open("rb") as file:
        digest = hashlib.blake2b(digest_size=16)
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _checksum(format: str, value: dict[str, Any]) -> str:
    text = json.dumps([format, value], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
