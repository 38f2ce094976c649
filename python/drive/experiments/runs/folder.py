"""Run folders: one process's from the first file to the last, with a config that a resumed run obeys."""

from __future__ import annotations

import errno
import os
import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch

from .inputs import InputError
from .locks import LOCK, locked
from .stored import read_stamped, write_stamped

FORMAT = "drive.run.v1"

# What may differ when a run goes on. Files and folders may have moved: what they hold is compared.
PLACES = ("data_dir", "init", "masks")
CHANGEABLE = ("lr", *PLACES)

Options = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """A run that this process works on.

    Attributes:
        command: whose: "prune", "compare", "train".
        folder: where.
        options: all that it depends on.
        resumed: what `config.json` holds; None: it is new.
    """

    command: str
    folder: Path
    options: Options
    resumed: dict[str, Any] | None = None

    @property
    def begun(self) -> bool:
        """Is there something to go on with?"""
        return (self.folder / "config.json").exists()

    @property
    def changeable(self) -> str:
        """The options that may differ when it goes on."""
        return _changeable(self.options)

    @property
    def go_on(self) -> str:
        """The command line that goes on with it."""
        return shlex.join(["drive", self.command, "--resume", "--out", str(self.folder)])

    def keep(self, read: Mapping[str, str]) -> None:
        """Make the folder a run that can be resumed, or see that what is resumed is given what it began with.

        Args:
            read: checksums of what was read, by option: "data", "masks", "init".

        Raises:
            InputError: another thing was read than at first.
        """
        config = self.resumed
        if config is None:
            config = {"command": self.command, "options": self.options, "read": dict(read)}
            write_stamped(self.folder / "config.json", FORMAT, {**config, "made_with": made_with()})
            return
        for name in config["read"].keys() | read.keys():
            if config["read"].get(name) != read.get(name):
                what = "other images or labels" if name == "data" else "another file"
                raise InputError(f"--{name} must be what {self.folder} was started with, got {what}")
        if self.options != config["options"]:
            before = {n: old for n, old in config["options"].items() if old != self.options[n]}
            changes = [*config.get("changed", []), before]
            changed = {**config, "options": self.options, "changed": changes}
            write_stamped(self.folder / "config.json", FORMAT, changed)

    def differences(self) -> dict[str, tuple[str, str]]:
        """What numbers may depend on and is not as it was when the run was started: name -> (then, now)."""
        if self.resumed is None:
            return {}
        then = self.resumed["made_with"]
        return {name: (then.get(name), now) for name, now in made_with().items() if then.get(name) != now}


@contextmanager
def open_run(
    command: str, out: Path | None, resume: bool, given: Options, complete: Callable[[Options], Options]
) -> Iterator[Run]:
    """A new or resumed run, which is this process's as long as the context lasts.

    A new run's options are `complete(given)`; `Run.keep` keeps them in `config.json`, from where a resumed
    run takes them. A folder that was made and into which nothing was written is removed.

    Args:
        command: "prune" or "train": whose run this is; default folders are `runs/<command>`,
            `runs/<command>-2` and so on.
        out: the folder, or None: the first free default one (resumed: the latest).
        resume: continue the run that the folder holds.
        given: options that the user gave; a resumed run must agree with them, but for CHANGEABLE.
        complete: adds the defaults of all other options.

    Raises:
        InputError: the folder cannot be written, another process works in it, it holds a run already, or
            (resumed) holds none, one of another command or version, or one with other options.
    """
    if resume:
        folder = out or _latest(command)
        if not (folder / "config.json").exists():
            raise InputError(f"--out must hold a run to resume, got {folder} (no config.json)")
        with locked(folder) as mine:
            if not mine:
                raise InputError(f"--out must be no other process's, got {folder}, in which one is at work")
            yield _resumed(command, folder, given, complete)
        return
    options = complete(given)
    for folder in [out] if out else _defaults(command):
        fresh = not folder.exists()
        make_folder(folder)
        with locked(folder) as mine:
            if mine and not (folder / "config.json").exists():
                try:
                    yield Run(command, folder, options)
                finally:
                    if fresh and os.listdir(folder) == [LOCK]:
                        with suppress(OSError):
                            (folder / LOCK).unlink()
                            folder.rmdir()
                return
            if out:
                why = "which holds one: give another, or --resume to go on with it"
                why = why if mine else "in which another process is at work"
                raise InputError(f"--out must be a folder without a run, got {folder}, {why}")


def make_folder(folder: Path) -> None:
    """Make the folder of --out if there is none; InputError if nothing can be written to it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise InputError(f"--out must be a writable folder, got {folder} ({error.strerror})") from error


def made_with(device: str = "cpu") -> dict[str, str]:
    """What numbers may depend on beside the options."""
    found = {"torch": torch.__version__, "cpu": torch.backends.cpu.get_cpu_capability()}
    return found if device == "cpu" else {**found, "gpu": torch.cuda.get_device_name(device)}


def _resumed(command: str, folder: Path, given: Options, complete: Callable[[Options], Options]) -> Run:
    config = read_stamped(folder / "config.json", FORMAT, "give --out another folder, without --resume")
    if config["command"] != command:
        raise InputError(
            f"--out must hold a run of `drive {command}`, got {folder} (of `drive {config['command']}`)"
        )
    stored: Options = config["options"]
    if stored.keys() != complete({}).keys():
        raise InputError(f"--out must hold a run of this version of drive, got {folder} with other options")
    for name, value in given.items():
        if stored[name] != value and (name not in CHANGEABLE or stored[name] is None):
            raise InputError(
                f"{_option(name)} must be {stored[name]} as in {folder}, got {value}; "
                f"what may change: {_changeable(stored)}"
            )
    options = {**stored, **given}
    for name in PLACES:
        if (place := options.get(name)) and not Path(place).exists():
            raise InputError(
                f"{_option(name)} must be what {folder} was started with, got {place}, where there is "
                "nothing: if it has moved, say where to"
            )
    return Run(command, folder, options, config)


def _changeable(options: Options) -> str:
    return ", ".join(_option(name) for name in CHANGEABLE if options.get(name) is not None)


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _defaults(command: str) -> Iterator[Path]:
    """`runs/<command>`, `runs/<command>-2` ..."""
    return (Path("runs") / (command if number == 1 else f"{command}-{number}") for number in count(1))


def _latest(command: str) -> Path:
    """Of the default folders that hold a run."""
    runs = {}
    for config in Path("runs").glob(f"{command}*/config.json"):
        if match := re.fullmatch(rf"{command}(?:-(\d+))?", config.parent.name):
            runs[int(match[1] or 1)] = config.parent
    if not runs:
        raise InputError(f"--resume must have a run to continue, got none in runs/{command}*")
    return runs[max(runs)]
