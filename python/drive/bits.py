"""Files of masks: safetensors, one bit an entry, in row-major order.

A file may be anybody's: nothing in it is believed before it is looked at, and nothing is allocated for what
it only claims to hold.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor

from .distributed.placement import Part, local
from .distributed.shards import Shards
from .distributed.team import team_of, together
from .files import write_atomic

FORMAT = "drive.masks.v1"

_MOST_DIMENSIONS = 64  # that PyTorch's operations take
_PIECE = 1 << 21  # entries that travel together: 256 KiB of bits, made of 16 MiB of indices


def write_packed(path: Path, masks: Mapping[str, Tensor], parameters: int | None) -> None:
    """Write masks; a crash leaves the old file or the new one.

    Args:
        parameters: of `Masks`.
    """
    packed = {
        name: torch.from_numpy(np.packbits(mask.cpu().contiguous().numpy(), axis=None))
        for name, mask in masks.items()
    }
    write_atomic(path, safetensors.torch.save(packed, _metadata(masks, parameters)))


def write_sharded(
    path: Path,
    masks: Mapping[str, Tensor],
    parameters: int | None,
    process_group: dist.ProcessGroup | None,
) -> None:
    """Write masks of which some are DTensors, by rank 0; all ranks must call it.

    No rank ever holds more than its own shards and a piece of a tensor.
    """
    team = team_of("Masks.save", masks, process_group)
    assert team is not None  # there are DTensors
    with together(team, "compare their masks") as said:
        shards = Shards(team, masks)
        said += shards.said
    shards.meet()
    with together(team, "write masks"):
        pieces = _pieces(shards, masks)
        try:
            if team.rank == 0:
                write_atomic(path, chain([_header(masks, parameters)], pieces))
        finally:  # whatever happened on rank 0, the others wait for its part in each piece
            for _ in pieces:
                pass


@contextmanager
def opened(op: str, path: str | os.PathLike[str], what: str, framework: str) -> Iterator[Any]:
    """A safetensors file of this package's, to be read and checked inside.

    Args:
        op: for the error messages.
        what: the file should be, likewise.
        framework: of `safetensors.safe_open`.

    Raises:
        FileNotFoundError: no such file. (OSError: others of the system's reasons.)
        ValueError: it is none; also for a ValueError that is raised inside.
    """
    name = os.fsdecode(path)
    try:
        if not stat.S_ISREG(os.stat(name).st_mode):  # one would wait for who writes into a FIFO
            raise ValueError("it must be a regular file")
        with safetensors.safe_open(name, framework=framework) as file:
            yield file
    except (safetensors.SafetensorError, ValueError, RecursionError) as error:  # of nested JSON
        raise ValueError(f"{op}: {name} is not a readable {what}: {error}") from error


def read_packed(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], int | None]:
    """The masks, on the CPU, and `parameters` that one of the above wrote.

    Raises:
        FileNotFoundError, ValueError: as `opened`.
    """
    with opened("Masks.load", path, "masks file", "numpy") as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise ValueError(f"its format must be {FORMAT!r}, got {metadata.get('format')!r:.80}")
        shapes = json.loads(metadata.get("shapes", "null"))
        if not isinstance(shapes, dict) or shapes.keys() != set(file.keys()):
            raise ValueError(f"shapes must be those of its tensors, got {shapes!r:.80}")
        parameters = json.loads(metadata.get("parameters", "null"))
        if parameters is not None and not is_size(parameters):
            raise ValueError(f"parameters must be an integer >= 0, got {parameters!r:.80}")
        return {name: _unpacked(file, name, shape) for name, shape in shapes.items()}, parameters


def is_size(value: object) -> TypeGuard[int]:
    """Is it a number of entries that there can be?"""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _unpacked(file: Any, name: str, shape: object) -> Tensor:
    if not isinstance(shape, list) or len(shape) > _MOST_DIMENSIONS or not all(map(is_size, shape)):
        raise ValueError(f"the shape of {name:.80} must be a list of sizes, got {shape!r:.80}")
    count, packed = prod(shape), file.get_slice(name)
    got = packed.get_dtype(), packed.get_shape()
    if not is_size(prod(filter(None, shape))) or got != ("U8", [(count + 7) // 8]):
        raise ValueError(f"{name:.80} must hold {count} bits, got {got[0]} {got[1]}")
    bits = np.unpackbits(file.get_tensor(name), count=count)
    return torch.from_numpy(bits.view(np.bool_)).view(shape)


def _metadata(masks: Mapping[str, Tensor], parameters: int | None) -> dict[str, str]:
    shapes = json.dumps({name: list(mask.shape) for name, mask in masks.items()})
    known = {} if parameters is None else {"parameters": str(parameters)}
    return {"format": FORMAT, "shapes": shapes, **known}


def _header(masks: Mapping[str, Tensor], parameters: int | None) -> bytes:
    """The beginning of a safetensors file: the header's length, and the header."""
    entries: dict[str, object] = {"__metadata__": _metadata(masks, parameters)}
    end = 0
    for name, mask in masks.items():
        size = (mask.numel() + 7) // 8
        entries[name] = {"dtype": "U8", "shape": [size], "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _pieces(shards: Shards, masks: Mapping[str, Tensor]) -> Iterator[bytes]:
    for name, mask in masks.items():
        here, part = local(mask).flatten(), shards.parts[name]
        for begin in range(0, part.numel, _PIECE):
            end = min(part.numel, begin + _PIECE)
            packed = torch.from_numpy(np.packbits(_bits(here, part, begin, end).numpy()))
            # no bit is of two owners: adding them up is putting them together
            yield shards.team.sum(packed, "write masks").numpy().tobytes()


def _bits(here: Tensor, part: Part, begin: int, end: int) -> Tensor:
    """The part's own bits among the entries [begin, end) of the whole tensor, the others 0."""
    bits = torch.zeros(end - begin, dtype=torch.uint8)
    if part.owner and here.numel():
        first, last = part.positions(torch.tensor([begin, end])).tolist()
        bits[part.indices(torch.arange(first, last)) - begin] = here[first:last].cpu().to(torch.uint8)
    return bits
