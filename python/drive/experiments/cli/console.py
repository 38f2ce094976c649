"""What a command says and shows while it works on a run folder."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import typer
from rich.console import Console

from drive.experiments.data import sources
from drive.experiments.data.dataset import Dataset
from drive.experiments.paper.queue import Outcome
from drive.experiments.paper.work import C
from drive.experiments.runs import inputs
from drive.experiments.runs.folder import Options, differences, open_run
from drive.experiments.runs.inputs import InputError

BAD_INPUT, INTERRUPTED = 2, 130  # exit statuses


def complain(command: str, message: str, status: int) -> int:
    """Say what is wrong in one line on stderr; returns the exit status."""
    print(f"{command}: {' '.join(message.split())}", file=sys.stderr)
    return status


@contextmanager
def open_console(
    command: str, out: Path | None, resume: bool, given: Options, complete: Callable[[Options], Options]
) -> Iterator[tuple[Path, Options, Console]]:
    """The folder and options of a new or resumed run (see `runs.open_run`), and where to print.

    Ctrl-C says how to go on with the run.

    Raises:
        InputError: as `open_run`; a device that is not here.
        typer.Exit: after Ctrl-C.
    """
    folder, options = open_run(command, out, resume, given, complete)
    try:
        inputs.device(options["device"])  # a resumed run may come from another machine
    except InputError as error:
        raise InputError(f"--device {error}") from error
    if resume:
        for name, (then, now) in differences(folder).items():
            print(f"note: {name} was {then} and is {now} now: numbers may differ", file=sys.stderr)
    try:
        yield folder, options, Console()
    except InputError:
        with suppress(OSError):
            folder.rmdir()  # if nothing was written yet
        raise
    except KeyboardInterrupt:
        begun = (folder / "config.json").exists()
        hint = f"; go on with: drive {command} --resume --out {folder}" if begun else ""
        raise typer.Exit(complain(f"drive {command}", f"interrupted{hint}", INTERRUPTED)) from None


def conclude(outcome: Outcome[C], text: str, out: Path, console: Console) -> None:
    """Print a page, and what of its cells is done.

    Raises:
        typer.Exit: a cell failed.
    """
    console.print(text, highlight=False, soft_wrap=True, markup=False)
    done, failed, left = len(outcome.results), len(outcome.failures), len(outcome.open)
    console.print(f"{done} of {done + failed + left} cells are finished, {failed} failed; results in {out}",
                  highlight=False)  # fmt: skip
    if left:
        console.print("the same command goes on with the others", highlight=False)
    if failed:
        raise typer.Exit(1)


def load(options: Options, console: Console) -> Dataset:
    """The data set of a run; names images that had to be left out."""
    with console.status(f"loading {options['data']}"):
        found = sources.load(options["data"], options["data_dir"])
    name_skipped(found, console)
    limit = options["limit_train"]
    return found if limit is None else found.limited(limit)


def name_skipped(found: Dataset, console: Console) -> None:
    """Say which images could not be read, if any."""
    if found.skipped:
        shown = ", ".join(found.skipped[:5]) + (", ..." if len(found.skipped) > 5 else "")
        console.print(f"left out {len(found.skipped)} unreadable images: {shown}", highlight=False)
