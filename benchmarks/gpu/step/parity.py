"""Small steps through every kernel that prunes on GPUs, each compared with the CPU bit for bit.

python -m benchmarks.gpu.step.parity compiled triton
"""

from __future__ import annotations

import sys
from dataclasses import replace

import torch

from benchmarks import ROOT

sys.path.append(str(ROOT / "tests" / "helpers"))
from misleading import TRAPS, misleading
from on_device import COST_ORACLES, ORACLES, assert_parity
from ugly import Step, sample_inputs, to_cost

from drive.experiments.bench.workload import implementation


def guarded() -> Step:
    """Three tensors would lose all they have but for min_keep: small ones, and one that many blocks count."""
    generator = torch.Generator().manual_seed(1)
    sizes = ((400_000, 1.0), (300_000, 1e-3), (9000, 1e-3), (50, 1e-3))
    weights = [torch.randn(n, generator=generator) * scale for n, scale in sizes]
    grads = [torch.randn(w.shape, generator=generator) for w in weights]
    masks = [torch.rand(w.shape, generator=generator) < 0.9 for w in weights]
    return Step(weights, grads, [], masks, False, 600_000, 40)


def unaligned() -> Step:
    """Each operand begins somewhere else."""
    generator = torch.Generator().manual_seed(2)
    weight, grad = (torch.randn(20_011, generator=generator).bfloat16() for _ in range(2))
    mask = torch.rand(20_011, generator=generator) < 0.9
    return Step([weight[1:20_001]], [grad[3:20_003]], [], [mask[6:20_006]], False, 15_000, 0)


def cases() -> dict[str, Step]:
    found = {f"sample input {index}": step for index, step in enumerate(sample_inputs())}
    first = found["sample input 0"]
    weight = first.weights[0].clone()
    weight[0, 0, 0, 0] = torch.nan
    many = [torch.randn(64) for _ in range(300)]
    ones = [torch.ones(9000), torch.ones(0), torch.ones(5000, 3)]
    long = torch.randn(1_100_000)  # from 2^20 entries on the sample is larger
    masks = [torch.ones_like(t, dtype=torch.bool) for t in (*many, *ones, long)]
    return {
        **found,
        "not finite": replace(first, weights=[weight]),
        "many tensors": Step(many, many, [], masks[:300], False, 10_000, 2),
        "all equal": Step(ones, ones, [], masks[300:303], True, 7000, 0),
        "over a million": Step([long], [long], [], masks[303:], True, 990_000, 0),
        "nothing to prune": replace(first, prune=0),
        "misleading sample": misleading(TRAPS[0], 40_007, 1 << 14)[0],
        "min_keep decides": guarded(),
        "unaligned": unaligned(),
    }


def costly() -> dict[str, Step]:
    """Some of them to a budget."""
    steps = cases()
    chosen = ("sample input 1", "all equal", "over a million", "min_keep decides")
    return {
        f"{case}, to a budget": to_cost(steps[case], range(7, 7 + len(steps[case].weights)), 0.5, 0.3)
        for case in chosen
    }


def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device")
    checked = 0
    for name in sys.argv[1:]:
        try:
            op, to_budget = implementation(name), implementation(name, op="prune_to_cost_")
        except ImportError as error:
            print(f"{name}: {error}")
            continue
        for some, kernels, oracles in ((cases(), op, ORACLES), (costly(), to_budget, COST_ORACLES)):
            for case, step in some.items():
                assert_parity(kernels, step, oracles)
                checked += 1
                print(f"{name}: {case}: right", flush=True)
    if not checked:
        raise SystemExit("there is nothing to check")
    print(f"{checked} steps are right")


if __name__ == "__main__":
    main()
