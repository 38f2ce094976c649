"""The compiled CUDA kernels, looked at without a GPU: architectures, registers, machine code of hot loops."""

from __future__ import annotations

import re
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

import drive_kernels

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
HOT = ("survey", "apply_list", "apply_keys")

if drive_kernels._C is None or drive_kernels._C.build_info()["cuda"] == "not built":
    pytest.skip("compiled without CUDA", allow_module_level=True)


def cuobjdump(*options: str) -> str:
    triton = find_spec("triton")  # which carries the tool
    assert triton is not None and triton.origin is not None
    tool = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    command = [str(tool), *options, drive_kernels._C.__file__]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def hot(function: str) -> str | None:
    """The name of a hot kernel in a mangled one."""
    return next((name for name in HOT if re.search(rf"\d{name}I[il]", function)), None)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    if request.param not in cuobjdump("-lelf"):
        pytest.skip(f"compiled without {request.param}")
    return request.param


def test_hot_kernels_neither_spill_nor_have_a_stack(architecture: str):
    report = cuobjdump("-res-usage", "-arch", architecture)
    usage = {
        function: resources
        for function, resources in re.findall(r"Function (\S+):\s+(REG:.*)", report)
        if hot(function)
    }
    assert len(usage) == 2 * len(HOT)  # for keys of 32 and 64 bits
    for function, resources in usage.items():
        assert "STACK:0 " in resources and "LOCAL:0 " in resources, f"{function}: {resources}"


def test_hot_loops_load_16_bytes_and_round_as_ieee_does(architecture: str):
    functions = cuobjdump("--dump-sass", "-arch", architecture).split("Function : ")[1:]
    code = {name: part for part in functions if (name := hot(part.split("\n")[0]))}
    assert code.keys() == set(HOT)
    for name, part in code.items():
        assert part.count("LDG.E.128") >= 8, f"{name}: loads of 16 bytes, several in flight"
        assert "LDL" not in part and "STL" not in part, f"{name}: local memory"
        assert "FMUL.FTZ" not in part and "FFMA" not in part, f"{name}: products neither flushed nor fused"
