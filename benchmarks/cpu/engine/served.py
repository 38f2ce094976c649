"""DeepSparse takes part from a process of its own: 1.8.0, its last version, needs an older Python and numpy.

python3.11 -m venv ENV && ENV/bin/pip install deepsparse==1.8.0

That brings numpy 1.26 and onnx 1.14; nothing else is needed.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from drive.experiments.bench.rivals import to_onnx

SERVER = Path(__file__).with_name("deepsparse_server.py")


class Served:
    """A network there, compiled.

    Attributes:
        version: of DeepSparse.
        output: for the example.
    """

    def __init__(self, process: subprocess.Popen[str], output: Path, words: Path):
        self._process, self._words = process, words
        self.version = self._answer().removeprefix("ready ")
        self.output: Tensor = torch.from_numpy(np.load(output))

    def burst(self, seconds: float) -> float:
        """The median seconds of a call, in a burst of so many; nothing runs there before and after."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{seconds}\n")
        return float(self._answer())

    def _answer(self) -> str:
        assert self._process.stdout is not None
        if line := self._process.stdout.readline():
            return line.strip()
        last = self._words.read_text().strip().rpartition("\n")[2]
        raise RuntimeError(f"DeepSparse must answer, got its end: {last or 'no words'}")


@contextmanager
def served(python: Path, model: nn.Module, example: Tensor) -> Iterator[Served]:
    """A process that has compiled the network; it ends with the context.

    Args:
        python: of the environment.

    Raises:
        RuntimeError: it did not come so far; with its last words.
    """
    with tempfile.TemporaryDirectory() as name:
        source, example_in, output, words = (
            Path(name, file) for file in ("model.onnx", "in.npy", "out.npy", "words")
        )
        source.write_bytes(to_onnx(model, example))
        np.save(example_in, example.numpy())
        command = [str(python), "-I", str(SERVER), str(source), str(example_in), str(output)]
        with (
            words.open("w") as errors,
            subprocess.Popen(
                [*command, str(torch.get_num_threads())], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=errors, text=True, bufsize=1, env={**os.environ, "NM_DISABLE_ANALYTICS": "1"},
            ) as process,
        ):  # fmt: skip
            try:
                yield Served(process, output, words)
            finally:
                process.kill()
