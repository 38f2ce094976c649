"""What a command says and shows while it works on a run folder."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import typer
from rich.console import Console

from drive.experiments.data import sources
from drive.experiments.data.dataset import Dataset
from drive.experiments.data.names import left_out
from drive.experiments.paper.queue import Outcome
from drive.experiments.paper.work import C
from drive.experiments.runs import inputs
from drive.experiments.runs.folder import Options, Run, open_run
from drive.experiments.runs.inputs import InputError
from drive.experiments.training.loop import Diverged

from .ends import Signalled

BAD_INPUT, INTERRUPTED = 2, 130  # exit statuses


def complain(command: str, message: str, status: int) -> int:
    """Say what is wrong in one line on stderr; returns the exit status."""
    print(f"{command}: {' '.join(message.split())}", file=sys.stderr)
    return status


@contextmanager
def open_console(
    command: str, out: Path | None, resume: bool, given: Options, complete: Callable[[Options], Options]
) -> Iterator[tuple[Run, Console]]:
    """A new or resumed run (see `runs.open_run`), and where to print.

    Whatever ends it early says how to go on with it.

    Raises:
        InputError: as `open_run`; a device that is not here.
        typer.Exit: it was interrupted.
    """
    with open_run(command, out, resume, given, complete) as run:
        try:
            inputs.device(run.options["device"])  # a resumed run may come from another machine
        except InputError as error:
            raise InputError(f"--device {error}") from error
        for name, (then, now) in run.differences().items():
            print(f"note: {name} was {then} and is {now} now: numbers may differ", file=sys.stderr)
        try:
            yield run, Console()
        except Diverged as error:
            hint = f"go on with: {run.go_on} --lr LR; what may change: {run.changeable}"
            raise InputError(f"{error}; {hint}") from error
        except KeyboardInterrupt as error:
            hint = f"go on with: {run.go_on}" if run.begun else ""
            raise interrupted(f"drive {command}", error, hint) from None


def interrupted(command: str, error: KeyboardInterrupt, hint: str = "") -> typer.Exit:
    """Say so in one line, and how to go on; what to raise."""
    by = f" ({error})" if isinstance(error, Signalled) else ""
    status = 128 + error.number if isinstance(error, Signalled) else INTERRUPTED
    return typer.Exit(complain(command, f"interrupted{by}{hint and f'; {hint}'}", status))


def conclude(command: str, outcome: Outcome[C], text: str, out: Path, console: Console) -> None:
    """Print a page, and what of its cells is done.

    Raises:
        typer.Exit: a cell failed, or it was interrupted.
    """
    console.print(text, highlight=False, soft_wrap=True, markup=False)
    done, failed, left = len(outcome.results), len(outcome.failures), len(outcome.open)
    console.print(f"{done} of {done + failed + left} cells are finished, {failed} failed; results in {out}",
                  highlight=False)  # fmt: skip
    if outcome.interrupted:
        raise interrupted(f"drive {command}", outcome.interrupted, "the same command goes on")
    if left:
        console.print("the same command goes on with the others", highlight=False)
    if failed:
        raise typer.Exit(1)


def load(options: Options, console: Console) -> Dataset:
    """The data set of a run; names files that were left out."""
    with console.status(f"loading {options['data']}"):
        found = sources.load(options["data"], options["data_dir"])
    name_skipped(found, console)
    limit = options["limit_train"]
    return found if limit is None else found.limited(limit)


def name_skipped(found: Dataset, console: Console) -> None:
    """Say which files were left out, if any: a line for each reason."""
    for line in left_out(found.skipped):
        printable = line.encode(console.encoding, "backslashreplace").decode(console.encoding)
        console.print(printable, highlight=False, soft_wrap=True, markup=False)
