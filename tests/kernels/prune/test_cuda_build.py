"""The compiled CUDA kernels, looked at without a GPU: architectures, registers, machine code of hot loops."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

import drive_kernels
from benchmarks.gpu.step.passes import PASSES, cuobjdump, main

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
HOT = ("survey", "apply_list", "apply_keys")
SOURCES = 2  # prune.cu and shards.cu have each of them

if drive_kernels._C is None or drive_kernels._C.build_info()["cuda"] == "not built":
    pytest.skip("compiled without CUDA", allow_module_level=True)


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
    usage = [pair for pair in re.findall(r"Function (\S+):\s+(REG:.*)", report) if hot(pair[0])]
    assert len(usage) == SOURCES * 2 * len(HOT)  # for keys of 32 and 64 bits
    for function, resources in usage:
        assert "STACK:0 " in resources and "LOCAL:0 " in resources, f"{function}: {resources}"


def registers(operands: str) -> set[int]:
    return {int(number) for number in re.findall(r"\bR(\d+)\b", operands)}


def batches(code: str) -> list[int]:
    """Loads of 16 bytes that are under way together: before any instruction reads what one of them brings."""
    found, waiting = [0], set()
    for instruction in re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?(.*?);", code):
        name, _, operands = instruction.partition(" ")
        target, _, sources = operands.partition(",")
        if waiting & registers(operands if name.startswith(("ST", "RED")) else sources):
            found.append(0)
            waiting = set()
        if name.startswith("LDG.E.128"):
            (first,) = registers(target)
            found[-1] += 1
            waiting |= set(range(first, first + 4))
    return found


def test_batches():
    load = "/*0000*/ @P1 LDG.E.128 R{}, desc[UR10][R{}.64+0x1000] ;"
    two = [load.format(4, 2), load.format(8, 2), "/*0010*/ FMUL R20, R9, R4 ;"]
    assert batches("\n".join(two)) == [2, 0]
    assert batches("\n".join([two[0], "/*0010*/ IADD3 R4, R21, R20, RZ ;", two[1]])) == [2]
    assert batches("\n".join([two[0], "/*0010*/ FMUL R20, R5, R21 ;", two[1]])) == [1, 1]
    assert batches("\n".join([two[0], load.format(12, 6)])) == [1, 1]


def test_hot_loops_load_16_bytes_and_round_as_ieee_does(architecture: str):
    """For each dtype all loads of a chunk are under way before the first is used: 4 a thread and operand."""
    functions = cuobjdump("--dump-sass", "-arch", architecture).split("Function : ")[1:]
    code = [(function, part) for part in functions if hot(function := part.split("\n")[0])]
    assert len(code) == SOURCES * 2 * len(HOT)
    for function, part in code:
        loads = 4 if hot(function) == "apply_list" else 8
        dtypes = 3 if re.search(rf"{hot(function)}Ii", function) else 4  # of float32 scores, and float64's
        loops = dtypes if hot(function) == "apply_list" else 2 * dtypes  # without a scale, and with one
        assert sum(batch >= loads for batch in batches(part)) == loops, f"{function}: {batches(part)}"
        assert "LDL" not in part and "STL" not in part, f"{function}: local memory"
        assert "FMUL.FTZ" not in part and "FFMA" not in part, (
            f"{function}: products neither flushed nor fused"
        )


def test_page_of_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """docs/gpu-passes.md can be made again."""
    monkeypatch.setattr(sys, "argv", ["passes.py", "--out", str(tmp_path / "page.md")])
    main()
    page = (tmp_path / "page.md").read_text()
    rows = {line.split(" | ")[0]: line.split(" | ")[1:] for line in page.splitlines()}
    assert all(len(rows[f"| {each.kernel}"]) == 8 for each in PASSES)
    ratios = [
        float(line.split(" | ")[-1].rstrip(" |")) for line in page.splitlines() if "| float32 |" in line
    ]
    assert len(ratios) == 3 and ratios == sorted(ratios, reverse=True) and min(ratios) > 17 / 12
