"""Triton kernels compiled for GPUs that are not here, and tests of theirs run in the interpreter."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy
import pytest
import torch
import triton
from numpy.lib import NumpyVersion
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction

HERE = Path(__file__).parent
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TYPES = {
    torch.uint8: "*u8", torch.int32: "*i32", torch.int64: "*i64", torch.bfloat16: "*bf16",
    torch.float16: "*fp16", torch.float32: "*fp32", torch.float64: "*fp64",
}  # fmt: skip
ALIGNED = [["tt.divisibility", 16]]
CAPABILITIES = (80, 90, 100)
EACH_CAPABILITY = pytest.mark.parametrize(
    "capability", [x if x == 90 else pytest.param(x, marks=pytest.mark.slow) for x in CAPABILITIES]
)
VERSION = ".".join(triton.__version__.split(".")[:2])
# Whose code was looked at: 3.6 comes with torch 2.10 and 2.11, 3.8 with what constraints.txt allows.
KNOWN_VERSIONS = ("3.6", "3.8")
# In all launches of a kernel, by version and architecture. ptxas gives a register (a store and a load) or two
# for one program more on a multiprocessor: the third of survey (80 a thread), the fourth of correlate (64).
KNOWN_SPILLS = {
    ("3.6", 80, "prune.survey"): 4,
    ("3.8", 100, "linear.correlate"): 4,
}


def expect(holds: bool, what: str) -> None:
    """Code is as good as it was. Versions of Triton that nobody has looked at may make it worse, though not
    wrong: a warning says so."""
    __tracebackhide__ = True
    if not holds and VERSION in KNOWN_VERSIONS:
        pytest.fail(what)
    if not holds:
        warnings.warn(f"Triton {triton.__version__} makes worse code: {what}", stacklevel=2)


class Launch(NamedTuple):
    """What decides the code of a kernel: the types of its arguments, the constants, the warps.

    Places are those of arguments: (index,), or (index, index in the tuple).
    """

    kernel: Any
    types: tuple[tuple[str, Any], ...]
    constants: tuple[tuple[tuple[int, ...], object], ...]
    aligned: tuple[tuple[int, ...], ...]  # addresses and numbers that 16 divides
    options: tuple[tuple[str, object], ...]

    @property
    def name(self) -> str:
        room = self.kernel.fn.__module__.split(".")[1]
        return f"{room}.{self.kernel.fn.__name__}"

    def __str__(self) -> str:
        names = self.kernel.arg_names
        constants = [f"{names[at[0]]}={x}" for at, x in self.constants if names[at[0]].isupper()]
        pointers = dict.fromkeys(str(kind) for _, kind in self.types if str(kind).startswith("*"))
        options = [f"{name}={x}" for name, x in self.options]
        return f"{self.name}({', '.join((*pointers, *constants, *options))})"

    def constant(self, name: str, default: object = None) -> Any:
        names = self.kernel.arg_names
        return dict(self.constants)[names.index(name),] if name in names else default

    def compile(self, capability: int) -> Any:
        source = ASTSource(
            fn=self.kernel,
            signature=dict(self.types),
            constexprs=dict(self.constants),
            attrs=dict.fromkeys(self.aligned, ALIGNED),
        )
        return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(self.options))

    @classmethod
    def of(cls, kernel: JITFunction, arguments: dict[str, object]) -> Launch:
        """As Triton sees its arguments: 1 and None are constants, and what 16 divides is known to be so."""
        constants, aligned = {}, []

        def type_of(value: Any, place: tuple[int, ...]) -> Any:
            if isinstance(value, tuple):
                return tuple(type_of(v, (*place, i)) for i, v in enumerate(value))
            if value is None or (isinstance(value, int) and value == 1):
                constants[place] = value
                return "constexpr"
            if isinstance(value, torch.Tensor) or value % 16 == 0:
                aligned.append(place)  # PyTorch's allocators align everything to at least 16 bytes
            if isinstance(value, torch.Tensor):
                return TYPES[value.dtype]
            return "i64" if value >= 2**31 else "i32"

        types = {}
        for i, parameter in enumerate(kernel.params):
            if parameter.is_constexpr:
                types[parameter.name] = "constexpr"
                constants[i,] = arguments[parameter.name]
            else:
                types[parameter.name] = type_of(arguments[parameter.name], (i,))
        options = {name: x for name, x in arguments.items() if name not in types}
        tables = (tuple(table.items()) for table in (types, constants))
        return cls(kernel, *tables, tuple(aligned), tuple(sorted(options.items())))


@contextmanager
def recorded() -> Iterator[set[Launch]]:
    """The launches that are made meanwhile, on CPU tensors; the kernels do not run."""
    found = set()

    def record(kernel: JITFunction, grid: tuple[int, ...], warmup: bool, **arguments: object) -> None:
        found.add(Launch.of(kernel, arguments))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "run", record)
        yield found


@contextmanager
def interpreted(file: str) -> Iterator[subprocess.Popen[str]]:
    """The tests in a file of interpreted/, in a process of their own that has TRITON_INTERPRET=1 when it
    imports Triton."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(HERE / "interpreted" / file)]
    with subprocess.Popen(
        command,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        yield process
        process.kill()


def patch_once() -> None:
    """The interpreter patches triton.language at every call of a function, which takes half of its time."""
    patch, patched = interpreter._patch_lang, set()

    def once(function):
        if id(function.__globals__) not in patched:
            patch(function)
            patched.add(id(function.__globals__))
        return SimpleNamespace(restore=lambda: None)

    interpreter._patch_lang = once


def assert_passes(interpreter: subprocess.Popen[str]) -> None:
    if VERSION == "3.6" and NumpyVersion(numpy.__version__) >= "2.4.0":
        pytest.skip("the interpreter of Triton 3.6 needs NumPy before 2.4")
    output, _ = interpreter.communicate(timeout=600)
    assert interpreter.returncode == 0, output
    assert re.search(r"^\d+ passed", output, re.M), output


class Code(NamedTuple):
    """What the GPU gets of a kernel."""

    instructions: list[str]  # their names, in order
    registers: int
    shared: int  # bytes

    @property
    def spills(self) -> int:
        """Loads and stores of registers that there were too few of."""
        return sum(op.startswith(("LDL", "STL")) for op in self.instructions)

    @classmethod
    def of(cls, compiled: Any) -> Code:
        with NamedTemporaryFile(suffix=".cubin") as cubin:
            cubin.write(compiled.asm["cubin"])
            cubin.flush()
            command = [TOOLS / "cuobjdump", "-sass", "-res-usage", cubin.name]
            text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)", text, re.M)
        return cls(found, int(re.findall(r"REG:(\d+)", text)[0]), compiled.metadata.shared)


def expect_known_spills(launches: Iterable[Launch], capability: int) -> None:
    spills: Counter[str] = Counter()
    for launch in launches:
        spills[launch.name] += Code.of(launch.compile(capability)).spills
    for name, found in spills.items():
        known = KNOWN_SPILLS.get((VERSION, capability, name), 0)
        expect(found == known, f"{name}, sm_{capability}: {found} spills of registers, {known} are known")
