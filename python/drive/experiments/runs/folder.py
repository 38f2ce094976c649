"""Run folders: files that are written whole or not at all, and a config that a resumed run obeys."""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from drive.files import write_atomic

from .inputs import InputError

Options = dict[str, Any]


def write_json(path: Path, value: Any) -> None:
    """`write_atomic` of indented JSON."""
    write_atomic(path, (json.dumps(value, indent=2) + "\n").encode())


def read_json(path: Path) -> Any:
    """What `write_json` wrote."""
    return json.loads(path.read_bytes())


def save_tensors(path: Path, value: dict[str, Any]) -> None:
    """`write_atomic` of torch.save."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    write_atomic(path, buffer.getvalue())


def load_tensors(path: Path, argument: str = "checkpoint") -> dict[str, Any]:
    """What `save_tensors` wrote, on the CPU.

    Raises:
        InputError: no such file, or not a checkpoint.
    """
    try:
        value = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, KeyError, ValueError) as error:
        why = "no such file" if isinstance(error, FileNotFoundError) else "it cannot be read"
        raise InputError(f"{argument} must be a checkpoint file, got {path} ({why})") from error
    if not isinstance(value, dict) or "model" not in value:
        raise InputError(f"{argument} must be a checkpoint with an entry 'model', got {path}")
    return value


def open_run(
    command: str, out: Path | None, resume: bool, given: Options, complete: Callable[[Options], Options]
) -> tuple[Path, Options]:
    """The folder of a new or resumed run, and its options.

    A new run's options are `complete(given)`; `keep_config` keeps them in `config.json`, from where a
    resumed run takes them.

    Args:
        command: "prune" or "train": whose run this is; default folders are `runs/<command>`,
            `runs/<command>-2` and so on.
        out: the folder, or None: the first free default one (resumed: the latest).
        resume: continue the run that the folder holds.
        given: options that the user gave; a resumed run must agree with them.
        complete: adds the defaults of all other options.

    Raises:
        InputError: the folder cannot be written, holds a run already, or (resumed) holds none, one
            of another command, or one with other options.
    """
    if resume:
        folder = out or _latest(command)
        stored = _stored(folder, command)
        for name, value in given.items():
            if stored.get(name) != value:
                option = name.replace("_", "-")
                raise InputError(f"--{option} must be {stored.get(name)} as in {folder}, got {value}")
        return folder, stored

    folder = out or _first_free(command)
    if (folder / "config.json").exists():
        raise InputError(f"--out must be a folder without a run (or give --resume), got {folder}")
    options = complete(given)
    make_folder(folder)
    return folder, options


def make_folder(folder: Path) -> None:
    """Make the folder of --out if there is none; InputError if nothing can be written to it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise InputError(f"--out must be a writable folder, got {folder} ({error.strerror})") from error


def keep_config(folder: Path, command: str, options: Options) -> None:
    """Make the folder a run that can be resumed; nothing changes if it is one already."""
    path = folder / "config.json"
    if not path.exists():
        write_json(path, {"command": command, "options": options, "made_with": made_with()})


def _stored(folder: Path, command: str) -> Options:
    try:
        config = read_json(folder / "config.json")
        owner, options, _ = config["command"], config["options"], config["made_with"]
    except FileNotFoundError as error:
        raise InputError(f"--out must hold a run to resume, got {folder} (no config.json)") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"--out must hold a readable config.json, got {folder}") from error
    if owner != command or not isinstance(options, dict):
        raise InputError(f"--out must hold a run of `drive {command}`, got {folder} (of `drive {owner}`)")
    return options


def _numbered(command: str) -> dict[int, Path]:
    """Default folders that hold a run, by their number."""
    found = {}
    for config in Path("runs").glob(f"{command}*/config.json"):
        if match := re.fullmatch(rf"{command}(?:-(\d+))?", config.parent.name):
            found[int(match[1] or 1)] = config.parent
    return found


def _latest(command: str) -> Path:
    runs = _numbered(command)
    if not runs:
        raise InputError(f"--resume must have a run to continue, got none in runs/{command}*")
    return runs[max(runs)]


def _first_free(command: str) -> Path:
    runs = _numbered(command)
    number = next(n for n in range(1, len(runs) + 2) if n not in runs)
    return Path("runs") / (command if number == 1 else f"{command}-{number}")


def differences(folder: Path) -> dict[str, tuple[str, str]]:
    """What numbers may depend on and is not as it was when the run was started: name -> (then, now)."""
    then = read_json(folder / "config.json")["made_with"]
    return {name: (then.get(name), now) for name, now in made_with().items() if then.get(name) != now}


def made_with(device: str = "cpu") -> dict[str, str]:
    """What numbers may depend on beside the options."""
    found = {"torch": torch.__version__, "cpu": torch.backends.cpu.get_cpu_capability()}
    return found if device == "cpu" else {**found, "gpu": torch.cuda.get_device_name(device)}
