"""Threads of one process that take turns."""

from __future__ import annotations

import os
import threading


class Turns:
    """
    Attributes:
        lock: for `with` statements; a thread may take it again. A forked process has a new one: who had it
            may be a thread that is not there (a DataLoader's worker has none of the others).
    """

    def __init__(self) -> None:
        self._renew()
        os.register_at_fork(after_in_child=self._renew)

    def _renew(self) -> None:
        self.lock = threading.RLock()
