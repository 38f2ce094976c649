"""How a command ends that is not let finish: signals, and output that nobody takes."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO


class Signalled(KeyboardInterrupt):
    """Another signal than Ctrl-C's that asks a process to end.

    Attributes:
        number: the signal's.
    """

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextmanager
def signals_interrupt() -> Iterator[None]:
    """SIGTERM (`timeout`, a scheduler, a container) and SIGHUP (a terminal that closes) are like Ctrl-C.

    Those that somebody, `nohup` say, has decided on stay as they are; in a thread beside the main one, all.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: object) -> None:
        raise Signalled(number)

    ours = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is signal.SIG_DFL]
    for number in ours:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


class Outlet:
    """A stream whose reader may leave: from then on what is written is dropped.

    Attributes:
        error: why nothing can be written any more.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream
        self.error: OSError | None = None
        if hasattr(stream, "reconfigure"):  # an ASCII terminal, file names that are not UTF-8
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        self._unless_it_failed(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._unless_it_failed(self._stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _unless_it_failed(self, write: Callable[[], object]) -> None:
        if self.error is not None:
            return
        try:
            write()
        except OSError as error:
            self.error = error
            # Python, when it ends, writes what is left, and fails if it cannot
            with suppress(OSError), open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())


@contextmanager
def outlets() -> Iterator[list[Outlet]]:
    """Output and errors as Outlets."""
    # where one was closed, its number would be given to the next file that is opened
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    before = sys.stdout, sys.stderr
    found = [Outlet(stream or open(os.devnull, "w")) for stream in before]  # noqa: SIM115
    sys.stdout, sys.stderr = found
    try:
        yield found
    finally:
        for outlet in found:
            outlet.flush()
        sys.stdout, sys.stderr = before
