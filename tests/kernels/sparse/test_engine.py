"""drive::engine_run against PyTorch, step by step, on every instruction set."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from engine_cases import TOLERANCE, Network, network, worst_error
from processes import run_on

from drive.sparse.frozen.engine import Engine
from drive.sparse.frozen.engine.lanes import cut
from drive.sparse.frozen.engine.tiles import Work, choose


@pytest.mark.parametrize("seed", range(40))
def test_networks(seed: int):
    n, outside, threads = network(seed)
    assert n.error(outside, threads) < TOLERANCE


@pytest.mark.parametrize("capability", ("default", "avx2"))
def test_other_instruction_sets(capability: str, tmp_path: Path):
    assert float(run_on(capability, tmp_path, worst_error, "40")) < TOLERANCE


@pytest.mark.parametrize("batch", (*range(1, 18), 32, 64))
def test_batches(batch: int):
    """Images of several lanes' worth, and what is left over; lanes of one phase become those of the next."""
    n = Network(torch.randn(batch, 3, 20, 20, generator=torch.Generator().manual_seed(batch)))
    n.conv("a", "x", outputs=32)
    n.conv("b", "a", outputs=32, stride=2)
    n.conv("c", "b", "b", outputs=32)
    n.conv("d", "c", outputs=64, stride=2)
    n.conv("e", "d", outputs=64, stride=2)
    n.add("f", "global_mean", "e")
    for threads in (1, 2):
        assert n.error({"c", "d", "e"}, threads) < TOLERANCE


@pytest.mark.parametrize("batch", (1, 4, 16, 32))
def test_a_residual_that_a_later_phase_reads_too(batch: int):
    """Its last reader adds in place; another, of more images a unit, stands before it, and runs after."""
    n = Network(torch.randn(batch, 16, 56, 56, generator=torch.Generator().manual_seed(batch)))
    n.conv("r", "x", outputs=64)
    n.conv("small", "r", outputs=256, stride=4)
    n.conv("smaller", "small", outputs=512, stride=2)
    n.conv("sum", "x", "r", outputs=64)
    assert n.error({"sum", "small", "smaller"}, 2) < TOLERANCE


@pytest.mark.parametrize("groups", (1, 2, 4, 32))
def test_groups_and_asymmetric_padding(groups: int):
    n = Network(torch.randn(2, 32, 13, 9))
    n.conv("a", "x", outputs=64, groups=groups, density=1.0)
    n.conv("b", "a", outputs=64, groups=groups, stride=2, padding=(0, 1), after=[1, 2])
    assert n.error({"a", "b"}, 2) < TOLERANCE


def test_all_pruned_and_empty_rows():
    n = Network(torch.randn(1, 8, 14, 14))
    n.conv("a", "x", outputs=16)
    n.constants["a.w"][3:9] = 0
    n.conv("b", "a", outputs=16)
    n.constants["b.w"].zero_()
    n.values = {"x": n.values["x"]}
    nodes, n.nodes = n.nodes, []
    for node in nodes:
        n.add(node.name, node.kind, *node.inputs, **node.options)
    assert n.error({"a", "b"}, 2) < TOLERANCE


def test_not_a_number_stays_where_it_belongs():
    """In its image, where a tap sees it; PyTorch's relu keeps it too."""
    x = torch.randn(3, 4, 12, 12)
    x[1, 2, 5, 5] = float("nan")
    n = Network(x)
    n.conv("a", "x", outputs=8, density=1.0)
    n.add(
        "m", "max_pool", "a", kernel=[2, 2], stride=[2, 2], padding=[0, 0], dilation=[1, 1], ceil_mode=False
    )
    shapes = {name: value.shape for name, value in n.values.items()}
    engine = Engine([n.nodes], shapes, n.constants, {"a", "m"}, 2)
    with engine.start() as call:
        call.run(0, n.values)
    for name in ("a", "m"):
        assert torch.equal(call.outputs[name].isnan(), n.values[name].isnan())


def test_the_same_bits_with_any_threads_and_from_any_thread():
    n, _, _ = network(7)
    shapes = {name: value.shape for name, value in n.values.items()}
    engines = [Engine([n.nodes], shapes, n.constants, {"c"}, threads) for threads in (1, 1, 2)]

    def run(engine: Engine) -> torch.Tensor:
        with engine.start() as call:
            call.run(0, n.values)
        return call.outputs["c"]

    first = run(engines[0])
    assert torch.equal(first, run(engines[1]))
    with ThreadPoolExecutor(4) as pool:
        for again in pool.map(run, [engines[0]] * 12):
            assert torch.equal(first, again)


def test_walks_fit_the_registers_and_the_outputs():
    for lanes in (cut(1, 4, 4, 56, 56), cut(16, 1, 1, 7, 7), cut(1, 8, 2, 13, 29)):
        for kernel, stride in (((1, 1), (1, 1)), ((3, 3), (2, 2)), ((7, 7), (2, 2))):
            for threads in (1, 2, 8):
                walk = choose(Work(lanes, 64, 128, 3000, kernel, stride, threads), 1)
                assert 1 <= walk.tile[0] * walk.tile[1] <= torch.ops.drive.engine_sums()
                assert 1 <= walk.block <= 128
                assert 1 <= walk.in_block <= 64


def test_refuses():
    with pytest.raises(
        ValueError, match=r"pack_taps: weight must be contiguous float32 \[O, C, kh, kw\], got"
    ):
        torch.ops.drive.engine_pack(torch.zeros(2, 3), 1, 2, 3, [0, 0], [1, 1], [3, 8])
    with pytest.raises(ValueError, match="engine_run: tensors must be contiguous float32, got Double"):
        program, phases = torch.zeros(0, dtype=torch.long), torch.zeros(0, 4, dtype=torch.long)
        arena = torch.ops.drive.engine_arena(1 << 12)
        torch.ops.drive.engine_run([torch.zeros(1).double()], program, phases, 0, [], arena, [0, 0], 1, 1)
