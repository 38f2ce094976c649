"""drive::prune_ in Triton without a GPU: its kernels interpreted, and compiled ahead of time and looked at,
as drive::prune_to_cost_ has them too; and which implementation is registered for CUDA. test_prune_gpu.py runs
it on a device."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from ugly import CostStep, Step, sample_inputs, to_cost

import drive_kernels
from drive.experiments.cli import info
from drive_kernels.library import references

pytest.importorskip("triton", reason="Triton is not installed")

import ahead_of_time
from ahead_of_time import (
    CAPABILITIES,
    KNOWN_VERSIONS,
    Code,
    Launch,
    assert_passes,
    expect,
    expect_known_spills,
    interpreted,
)
from triton_launches import prune as launches

from drive_kernels.prune.triton import bracket, host, passes, search, ties, weakest
from drive_kernels.prune.triton import launch as launcher


@pytest.fixture(scope="module", autouse=True)
def interpreter() -> Iterator[subprocess.Popen[str]]:
    """The tests in helpers/interpreted/prune.py, while those of this file run."""
    with interpreted("prune.py") as process:
        yield process


HOT = (  # kernel, wide, fresh, costed
    *product(("survey", "apply_keys"), (False, True), (False, True), (False, True)),
    *product(("apply_bits",), (False, True), (None,), (None,)),
)


def test_launches_are_all_there():
    kernels = {launch.kernel.fn.__name__ for launch in launches()}
    assert kernels == {
        "list_chunks", "sample", "bracket", "survey", "decide", "count_digit", "count_listed", "pick_digit",
        "count_ties", "locate", "recount", "cut", "look_above", "apply_bits", "apply_keys", "apply_others",
        "finish",
    }  # fmt: skip
    for way in HOT:
        assert any(is_hot(x, *way) for x in launches()), way


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_all_launches_compile(capability: int):
    for launch in launches():
        ptx = launch.compile(capability).asm["ptx"]
        for inexact in (".ftz", "fma.rn.f", ".approx", "div.full"):
            assert inexact not in ptx, f"{launch}: {inexact}"


def test_the_newest_triton_that_make_installs_is_known():
    constraints = (Path(__file__).parents[3] / "constraints.txt").read_text()
    newest = re.search(r"^triton<=(\d+\.\d+)", constraints, re.M)
    assert newest and newest[1] in KNOWN_VERSIONS


def test_worse_code_fails_with_known_versions_and_warns_with_others(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ahead_of_time, "VERSION", KNOWN_VERSIONS[0])
    with pytest.raises(pytest.fail.Exception, match="two spills"):
        expect(False, "two spills")
    monkeypatch.setattr(ahead_of_time, "VERSION", "0.1")
    with pytest.warns(UserWarning, match="worse code: two spills"):
        expect(False, "two spills")


def is_hot(launch: Launch, name: str, wide: bool, fresh: bool | None, costed: bool | None) -> bool:
    return (
        launch.kernel.fn.__name__ == name
        and launch.constant("PLAIN_ONES", True)
        and tuple(map(launch.constant, ("WIDE", "FRESH", "COSTED"))) == (wide, fresh, costed)
    )


@pytest.mark.parametrize("name, wide, fresh, costed", HOT)
def test_plain_chunks_move_16_bytes_at_a_time(name: str, wide: bool, fresh: bool | None, costed: bool | None):
    """What all entries of an ordinary network go through, on a Hopper GPU."""
    launch = next(x for x in launches() if is_hot(x, name, wide, fresh, costed))
    found = Code.of(launch.compile(90)).instructions
    assert len(found) > 400
    # Vectors a thread, 16 entries. For scores those of float32, bfloat16, float16 and float64, in a branch
    # each; and of a third operand in a branch of that, where scores are float64. Weights of 4, 2 and 8 bytes.
    threads = 32 * host.TUNING.plain_warps
    operands, weights = (
        sum(host.TUNING.chunk * size // 16 // threads for size in sizes[: None if wide else -1])
        for sizes in ((4, 2, 2, 8), (4, 2, 8))
    )
    of_scores, of_weights = {
        "survey": ((3 if wide else 2) * operands, 0),
        "apply_keys": ((3 if wide else 2) * operands, weights),
        "apply_bits": (0, weights),
    }[name]
    loads = found.count("LDG.E.128.CONSTANT") + found.count("LDG.E.128")
    expect(loads == of_scores + of_weights, f"{launch}: {loads} loads of 16 bytes")
    narrow = [op for op in found if re.match(r"(LDG|STG)\.E\.[US]?(8|16)\b", op)]
    expect(not narrow, f"{launch}: masks, bits and half floats go in vectors, too, got {narrow}")
    stores = found.count("STG.E.128")
    expect(stores == of_weights, f"{launch}: {stores} stores of 16 bytes")


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_plain_chunks_stay_in_registers(capability: int):
    hot = {x for x in launches() for way in HOT if is_hot(x, *way)}
    assert len(hot) == len(HOT)
    expect_known_spills(hot, capability)


def test_in_the_interpreter(interpreter: subprocess.Popen[str]):
    """Against the reference: helpers/interpreted/prune.py."""
    assert_passes(interpreter)


def served(setup: str) -> list[str]:
    """What `drive info` says of CUDA in a new process, after `setup`; is a kernel there, Triton imported?"""
    script = f"""
import sys
{setup}
import torch
from drive.experiments.cli.info import facts
print(facts()["drive::prune_"]["cuda"])
print(torch._C._dispatch_has_kernel_for_dispatch_key("drive::prune_", "CUDA"), "triton" in sys.modules)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return run.stdout.splitlines()


NOT_COMPILED = "sys.modules['drive_kernels._C'] = None\n"
NO_TRITON = """
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find(name, *rest)
"""


def test_serves_where_the_compiled_part_is_missing():
    says, registered = served(NOT_COMPILED)
    why = r"the compiled part is not loaded \(.*drive_kernels\._C.*\)"
    assert re.fullmatch(f"Triton kernel, because {why}", says)
    assert registered == "True False"


def test_reference_serves_where_triton_is_missing_too():
    says, registered = served(NOT_COMPILED + NO_TRITON)
    why = r"the compiled part is not loaded \(.*\) and Triton is not installed"
    assert re.fullmatch(f"reference in PyTorch, because {why}", says)
    assert registered == "True False"


@pytest.mark.parametrize(
    ("implementations", "says"),
    (
        ({"compiled CUDA kernel": None, "Triton kernel": "no"}, "compiled CUDA kernel"),
        ({"compiled CUDA kernel": "no GCC", "Triton kernel": None}, "Triton kernel, because no GCC"),
        (
            {"A": "of X", "B": "of Y", "reference in PyTorch": None},
            "reference in PyTorch, because of X and of Y",
        ),
    ),
)
def test_info(implementations: dict[str, str | None], says: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(drive_kernels.implementations["drive::prune_"], "cuda", implementations)
    assert info.facts()["drive::prune_"]["cuda"] == says


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    (
        ({"weights": []}, ValueError, "weights must not be empty"),
        ({"grads": [], "mask_grads": [torch.ones(2)]}, ValueError, "must be of one length .* got 1, 0, 1, 1"),
        ({"mask_grads": [torch.ones(2)] * 2}, ValueError, "must be of one length .* got 1, 1, 2, 1"),
        ({"grads": [torch.ones(3)]}, ValueError, r"grads\[0\] must have shape \[2\], got \[3\]"),
        (
            {"grads": [torch.ones(2).double()]},
            TypeError,
            r"grads\[0\] must be torch.float32, got torch.float64",
        ),
        ({"masks": [torch.ones(2)]}, TypeError, r"masks\[0\] must be torch.bool, got torch.float32"),
        ({"weights": [torch.ones(2).int()]}, TypeError, r"weights\[0\] must be float32.* got torch.int32"),
        ({"grads": [torch.ones(2, device="meta")]}, ValueError, r"grads\[0\] must be on cpu, got meta"),
        ({"grads": [torch.ones(2).to_sparse()]}, TypeError, r"grads\[0\] must be a dense tensor, got layout"),
        ({"min_keep": -1}, ValueError, "must be >= 0, got 1, -1"),
    ),
)
def test_refuses(changed: dict[str, object], error: type[Exception], message: str):
    good = Step([torch.ones(2)], [torch.ones(2)], [], [torch.ones(2, dtype=torch.bool)], True, 1, 0)
    with pytest.raises(error, match=f"drive::prune_: .*{message}"):
        launcher.prune_(*replace(good, **changed).args())


def costly(step: Step) -> CostStep:
    return to_cost(step, [3, 1000, 70][: len(step.weights)], 0.5, 0.4)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "changed", ({}, {"least_listed": 5, "entries_a_listed_key": 1 << 40}, {"sigmas": 0.0})
)
@pytest.mark.parametrize("index", range(len(sample_inputs())))
@pytest.mark.parametrize("costed", (False, True))
def test_on_the_device(costed: bool, index: int, changed: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    """Also where the list is too short, or the bracket does not hold: through all entries."""
    monkeypatch.setattr(host, "TUNING", host.TUNING._replace(**changed))
    step = sample_inputs()[index]
    step = costly(step) if costed else step
    ours, theirs = step.to("cuda"), step.to("cpu")
    outputs = getattr(launcher, step.op)(*ours.args())
    expected = references[step.op](*theirs.args())
    for mine, other in zip(ours.masks + ours.weights, theirs.masks + theirs.weights, strict=True):
        assert torch.equal(mine.cpu(), other)
    for mine, other in zip(outputs[:2], expected[:2], strict=True):
        assert torch.equal(mine.cpu(), other)
    torch.testing.assert_close(outputs[2].cpu(), expected[2], rtol=1e-12, atol=0, equal_nan=True)


def test_a_captured_table_is_what_any_is():
    table = host.table_of(
        [host.as_item(torch.ones(3, 4, 5).transpose(0, 2), None, torch.ones(5, 4, 3) > 0, None, False)],
        True, 7, 2, 0, 1 << 40,
    )  # fmt: skip
    device = torch.device("cpu")
    for numbers in (table, [0, -1, 2**63 - 1, -(2**63), 2**53 + 1]):
        assert torch.equal(host._by_arguments(numbers, device), torch.tensor(numbers))


@pytest.mark.gpu
def test_captured():
    """Steps in one graph, replayed when all that the host had is gone; the first ever call is refused."""
    some = [sample_inputs()[index] for index in (0, 1)]
    steps = [step.to("cuda") for step in (*some, *map(costly, some))]
    for module in (bracket, passes, search, ties, weakest):
        for kernel in vars(module).values():
            if hasattr(kernel, "device_caches"):
                kernel.device_caches.clear()
    graph = torch.cuda.CUDAGraph()
    with (
        pytest.raises(
            RuntimeError, match="cannot be loaded while a CUDA graph is captured: make the same call"
        ),
        torch.cuda.graph(graph),
    ):
        launcher.prune_(*steps[0].args())
    for step in steps:
        getattr(launcher, step.op)(*step.clone().args())
    expected, before = [step.to("cpu") for step in steps], [step.clone() for step in steps]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for step in steps:
            getattr(launcher, step.op)(*step.args())
    torch._C._host_emptyCache()
    for step in expected:
        references[step.op](*step.args())
    for _ in range(2):
        for step, old in zip(steps, before, strict=True):
            for tensor, value in zip(step.weights + step.masks, old.weights + old.masks, strict=True):
                tensor.copy_(value)
        graph.replay()
        for step, other in zip(steps, expected, strict=True):
            for mine, theirs in zip(step.masks + step.weights, other.masks + other.weights, strict=True):
                assert torch.equal(mine.cpu(), theirs)
