"""The Triton kernels in the interpreter, on CPU tensors, against the reference: test_prune_triton.py runs
these tests in a process of their own, for TRITON_INTERPRET=1 must be set before Triton is imported."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from same import PLACES, SMALL, TUNINGS, assert_same
from ugly import Step, sample_inputs, step_of, steps

from drive_kernels.prune.op import reference
from drive_kernels.prune.triton import access, host, launch, tables
from drive_kernels.prune.triton.host import Tuning
from drive_kernels.prune.triton.tables import HEADER

CSRC = Path(__file__).parents[3] / "csrc"


@settings(
    max_examples=50, deadline=None, derandomize=True, phases=[Phase.generate], print_blob=True,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
@given(
    step=steps().filter(lambda step: sum(w.numel() for w in step.weights) < 6000),
    tuning=st.sampled_from(sorted(TUNINGS)),
    poison=st.sampled_from([None] * 9 + [torch.nan, -torch.inf]),
    at=st.integers(0, 2**20),
)
def test_equals_reference(step: Step, tuning: str, poison: float | None, at: int):
    weight = step.weights[at % len(step.weights)]
    if poison is not None and weight.numel():
        weight[tuple(at % size for size in weight.shape)] = poison
    assert_same(step, TUNINGS[tuning])


@pytest.mark.parametrize("index", range(len(sample_inputs())))
def test_real_sizes(index: int):
    """With the chunks, samples and list that a GPU gets: 107,000 entries."""
    assert_same(sample_inputs()[index], Tuning())


SHAPES = [[24, 8, 3, 3], [600], [7], [0, 3], [8, 16, 3, 3]]


@pytest.mark.parametrize("layout", ("contiguous", "channels_last", "transposed", "sliced"))
@pytest.mark.parametrize("values", ("equal", "half zero"))
def test_ties_end_anywhere(values: str, layout: str):
    """In the order of the indices, whatever the order of the memory."""
    for fraction in (0.1, 0.48, 0.7):
        assert_same(step_of(SHAPES, values, layout, fraction=fraction))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16, torch.float64))
@pytest.mark.parametrize("fresh", (True, False))
def test_threshold_is_found_everywhere(dtype: torch.dtype, fresh: bool):
    """Among the listed keys, on both edges of the bracket, and where it did not hold or the list was full."""
    places = set()
    for tuning in TUNINGS.values():
        for values, fraction in (("normal", 0.5), ("ties", 0.4), ("half zero", 0.7), ("equal", 0.2)):
            step = step_of([[1500], [30, 40]], values, dtype=dtype, fresh=fresh, fraction=fraction)
            places.add(assert_same(step, tuning))
    assert places == set(PLACES.values())


F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
PLAIN = [[64, 2, 4, 4], [32, 48], [2560]]  # of whole chunks


def some_equal(dtypes: tuple[torch.dtype, ...], layout: str = "contiguous", **options) -> Step:
    """Scores of which some fifty each are equal: few of those in the bracket are on the threshold."""
    step = step_of(PLAIN, "normal", layout, **options)
    return replace(
        step,
        weights=[(64 * w).round().to(t) / 64 for w, t in zip(step.weights, dtypes, strict=True)],
        grads=[g.sign().to(t) for g, t in zip(step.grads, dtypes, strict=True)],
        mask_grads=[g.sign().to(t) for g, t in zip(step.mask_grads, dtypes, strict=False)],
    )


def split_chunks(step: Step) -> list[int]:
    """Chunks in which some entries of the best score that does not always survive do, and others do not."""
    ours = step.clone()
    reference(*ours.args())
    size, old, new = (
        torch.cat([t.flatten() for t in tensors])
        for tensors in (
            [w.double().abs() for w in step.weights],  # gradients are signs
            [torch.ones_like(m) if step.fresh else m for m in step.masks],
            ours.masks,
        )
    )
    on = size == size[old & ~new].max()
    lost, stays = ((on & x).view(-1, SMALL.chunk).any(1) for x in (old & ~new, new))
    return (lost & stays).nonzero().flatten().tolist()


@pytest.mark.parametrize("fresh", (True, False))
@pytest.mark.parametrize("min_keep", (0, 300))
@pytest.mark.parametrize(
    ("dtypes", "three"),
    (((F32,) * 3, False), ((F32, BF16, F16), False), ((F16, F64, BF16), False), ((F32, BF16, F16), True)),
)
def test_by_bits(dtypes: tuple[torch.dtype, ...], three: bool, min_keep: int, fresh: bool):
    """Without gradients and old masks, also where ties are cut within a chunk, and some entries guarded."""
    step = some_equal(dtypes, three=three, min_keep=min_keep, fresh=fresh)
    if min_keep:
        step.weights[1].mul_(2**-7)  # falls below its guard
    assert split_chunks(step)
    assert assert_same(step, by="apply_bits") == "inside"


def test_by_bits_beside_a_tensor_in_another_order():
    """In which the ties are cut: its plain chunks are left to apply_others."""
    step = some_equal((F32,) * 3, "channels_last", fresh=False)
    assert split_chunks(step)[0] * SMALL.chunk < step.weights[0].numel()
    assert assert_same(step, by="apply_bits") == "inside"


@pytest.mark.parametrize("min_keep", (0, 300))
def test_by_bits_on_the_upper_edge_if_all_of_it_survives(min_keep: int):
    step = step_of(PLAIN, "equal", min_keep=min_keep)
    for weight in step.weights:
        weight.view(-1)[::2] *= 2
    assert assert_same(step, by="apply_bits") == "on high"
    assert assert_same(replace(step, prune=step.prune + 1), by="apply_keys") == "on high"


@pytest.mark.parametrize("fresh", (True, False))
def test_by_keys_where_the_bits_do_not_decide(fresh: bool):
    step = step_of(PLAIN, "normal", fresh=fresh)
    half = step_of(PLAIN, "half zero", fresh=fresh, fraction=0.7)
    assert assert_same(step, TUNINGS["list too short"], by="apply_keys") == "anywhere"
    assert assert_same(half, by="apply_keys") == "on low"
    assert assert_same(replace(step, prune=1 << 20), by="apply_keys") == "anywhere"
    step.grads[1][step.masks[1]] = torch.nan
    assert assert_same(step, by="apply_keys") == "anywhere"


@pytest.mark.parametrize("three", (False, True))
@pytest.mark.parametrize("layout", ("contiguous", "channels_last", "sliced"))
def test_min_keep(layout: str, three: bool):
    for values, fresh, min_keep in (("normal", True, 3), ("ties", False, 40), ("equal", True, 250)):
        step = step_of(SHAPES, values, layout, fresh=fresh, fraction=0.8, min_keep=min_keep, three=three)
        step.weights[1] *= 1e-3  # falls below its guard
        assert_same(step)


def test_bracket_is_for_what_no_guard_keeps():
    """Half of the survivors are guarded: among all entries the sample would be far off."""
    assert assert_same(step_of([[3000], [1000]], "normal", min_keep=500)) == "inside"


@pytest.mark.parametrize("min_keep", (0, 5))
@pytest.mark.parametrize("fresh", (True, False))
@pytest.mark.parametrize("bad", (torch.nan, torch.inf, "all ones"))
def test_non_finite_scores_change_nothing(bad: float | str, fresh: bool, min_keep: int):
    step = step_of([[700], [33, 40]], "normal", fresh=fresh, min_keep=min_keep)
    step.masks[0][[3, 600]] = torch.tensor([False, True])
    if bad == "all ones":  # the NaN whose key wraps around
        step.grads[0].view(torch.int32)[[3, 600]] = -1
    else:
        step.grads[0][[3, 600]] = bad
    assert_same(step)


@pytest.mark.parametrize("shapes", ([[0]], [[]], [[], [0, 4], [1, 1]], [[3], [0]]))
def test_few_entries(shapes: list[list[int]]):
    for min_keep in (0, 1):
        for fraction in (0.0, 0.5, 1.0):
            assert_same(step_of(shapes, "normal", fraction=fraction, min_keep=min_keep))
    assert_same(replace(step_of(shapes, "normal"), prune=100))


def test_signs_of_zeros():
    weight = torch.tensor([-0.0, 0.0, -1.0, 2.0, -0.0, 3.0])
    grad = torch.tensor([9.0, 1.0, -0.0, 1.0, 1.0, 1.0])
    for prune in range(7):
        mask = torch.tensor([True, True, True, True, False, True])
        assert_same(Step([weight], [grad], [], [mask], False, prune, 0))


def test_offsets_beyond_2_31():
    """Three entries of a tensor of 6 GB, the rest of which is never touched."""
    far = torch.empty(2**31 + 2**30, dtype=torch.bfloat16)[:: 2**30]
    far.copy_(torch.tensor([1.0, 2.0, 3.0]))
    mask = torch.zeros(3, dtype=torch.bool)
    kept, _, _ = launch.prune_([far], [torch.ones(3, dtype=torch.bfloat16)], [], [mask], True, 1, 0)
    assert (kept.tolist(), far.tolist(), mask.tolist()) == ([2], [0, 2, 3], [False, True, True])


@pytest.mark.parametrize(
    ("at", "plain"),
    (((1, 0, 0), 0), ((0, 1, 0), 0), ((0, 0, 1), 0), ((0, 0, 4), 2), ((4, 4, 8), 2)),
)
def test_unaligned_operands(at: tuple[int, int, int], plain: int):
    """Views that begin some entries into their memory: masks may do so by 4 bytes, the others by 16."""
    step = step_of([[1100]], "normal", fresh=False)
    operands = (step.weights[0], step.grads[0], step.masks[0])
    w, g, m = (t[begin : begin + 1050] for t, begin in zip(operands, at, strict=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host, "TUNING", SMALL)
        assert host.as_item(w, g, m, None, False).plain_chunks == plain
    assert_same(Step([w], [g], [], [m], False, 500, 0))


PROGRAM = r"""
#include <cstdio>
#include "prune/key.h"
int main() {
  unsigned long long bits;
  int wide;
  while (std::scanf("%d %llx", &wide, &bits) == 2) {
    std::printf("%lld\n", wide ? (long long)drive::key_of_bits<int64_t>(bits)
                               : (long long)drive::key_of_bits<int32_t>((uint32_t)bits));
  }
  std::printf("%lld %lld\n", (long long)drive::kTop<int32_t>, (long long)drive::kTop<int64_t>);
}
"""


@triton.jit
def keys_of(scores, keys, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    tl.store(keys + lane, access.key_of(tl.load(scores + lane)))


def test_keys_are_those_of_key_h(tmp_path: Path):
    tiny, huge, inf = 1e-45, 3e38, torch.inf
    values = torch.tensor(
        [0.0, -0.0, tiny, -tiny, 1.5, -1.5, 1e-20, huge, inf, -inf, torch.nan, 1, 2, 3, 4, 5]
    )
    quiet, source, program = values.clone(), tmp_path / "keys.cpp", tmp_path / "keys"
    quiet.view(torch.int32)[0] = -1
    ours, lines = [], []
    for scores, integer in ((quiet, torch.int32), (values.double(), torch.int64)):
        keys = torch.empty(16, dtype=integer)
        keys_of[(1,)](scores, keys, BLOCK=16)
        ours += keys.tolist()
        mask = (1 << (8 * integer.itemsize)) - 1
        lines += [f"{int(integer == torch.int64)} {b & mask:x}" for b in scores.view(integer).tolist()]
    source.write_text(PROGRAM)
    subprocess.run(["g++", "-std=c++17", f"-I{CSRC}", str(source), "-o", str(program)], check=True)
    run = subprocess.run([str(program)], input="\n".join(lines), capture_output=True, text=True, check=True)
    *keys, tops = run.stdout.splitlines()
    assert ours == [int(key) for key in keys]
    assert tops.split() == [str(tables.TOP32.value), str(tables.TOP64.value)]


@triton.jit
def masked_histogram(x, mask, out, BLOCK: tl.constexpr, BUCKETS: tl.constexpr):
    lane, bucket = tl.arange(0, BLOCK), tl.arange(0, BUCKETS)
    found = tl.histogram(tl.load(x + lane), BUCKETS, mask=tl.load(mask + lane) != 0)
    tl.atomic_add(out + bucket, found.to(tl.int64), mask=found > 0, sem="relaxed")


def test_histogram_leaves_out_what_is_masked():
    """The interpreter's, too: all that is counted by digits stands on it."""
    generator = torch.Generator().manual_seed(6)
    x = torch.randint(0, 16, (256,), generator=generator, dtype=torch.int32)
    mask = (torch.rand(256, generator=generator) < 0.5).to(torch.int8)
    out = torch.zeros(16, dtype=torch.int64)
    for _ in range(2):
        masked_histogram[(1,)](x, mask, out, BLOCK=256, BUCKETS=16)
    assert torch.equal(out, 2 * torch.bincount(x[mask != 0], minlength=16))


def test_header_and_rows_are_as_long_as_they_say():
    step = step_of([[5], [4, 3]], "normal")
    items = [
        host.as_item(w, g, m, None, False)
        for w, g, m in zip(step.weights, step.grads, step.masks, strict=True)
    ]
    for min_keep in (0, 1):
        table = host.table_of(items, False, 9, min_keep, 0, 100)
        states = 1 + len(items) * (min_keep > 0)
        walks = 2 * tables.DIM.value
        rows = len(items) * tables.ROW.value
        assert len(table) == HEADER.value + rows + states * tables.STATE.value + walks
