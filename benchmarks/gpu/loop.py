"""drive.prune on a GPU: an iteration of DRIVE on ResNet-18, eager and captured, and the pruning step's share.

python -m benchmarks.gpu.loop --out loop.md
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

import drive
from benchmarks import pages
from drive._scoring.capture import WARM_UP
from drive.files import write_atomic
from drive.methods import Drive

BATCH = 128
SETTLED = WARM_UP + 2  # iterations before the first that counts: the eager ones, the capture, one replay

HEADER = """# DRIVE's iterations on {device}

{facts}

ResNet-18 with 10 classes in channels_last, batches of {batch} in pinned memory of the host, {iterations}
iterations of `drive.prune(method="drive", sparsity=0.98)`. At 32x32 its stem is a 3x3 convolution, at 224x224
that of ImageNet. float32 is without TF32, bfloat16 is `autocast=torch.bfloat16`.

By CUDA events, medians from iteration {first} on. An iteration: fetch and copy a batch, forward, backward,
and the pruning step. The step: scores, selection, weights and masks, and whatever the device then waits for
the host; it is to take 5 % at most. The run: all of `drive.prune`, with what it saves and restores, and with
the capture.

"""
COLUMNS = [
    "input",
    "precision",
    "forward and backward",
    "iteration, ms",
    "images/s",
    "step, ms",
    "step, %",
    "run, s",
]


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride > 1:
            projection = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu_()))
        return (y + self.shortcut(x)).relu_()


def resnet18(side: int) -> nn.Module:
    """torchvision's, which need not be installed: [B, 3, side, side] -> [B, 10]."""
    small = side < 64
    stem = nn.Conv2d(3, 64, 3, 1, 1, bias=False) if small else nn.Conv2d(3, 64, 7, 2, 3, bias=False)
    layers = [stem, nn.BatchNorm2d(64), nn.ReLU(inplace=True)]
    layers += [] if small else [nn.MaxPool2d(3, 2, 1)]
    for inputs, outputs, stride in ((64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2)):
        layers += [Block(inputs, outputs, stride), Block(outputs, outputs, 1)]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))
    return model.to(memory_format=torch.channels_last)


class Timed(Drive):
    """DRIVE that marks on the device's time line where its gradients begin and end."""

    def __init__(self) -> None:
        super().__init__()
        self.marks: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def rank(self, problem: drive.methods.Problem) -> drive.methods.Ranking:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        found = super().rank(problem)
        end.record()
        self.marks.append((begin, end))
        return found


@dataclass(frozen=True)
class Case:
    side: int
    autocast: torch.dtype | None
    capture: bool

    def cells(self, iterations: int) -> list[str]:
        """A line of the table."""
        iteration, step, run = measure(self, iterations)
        return [
            f"{self.side}x{self.side}",
            "bfloat16" if self.autocast else "float32",
            "captured" if self.capture else "eager",
            f"{iteration:.3f}",
            f"{1e3 * BATCH / iteration:.0f}",
            f"{step:.3f}",
            f"{100 * step / iteration:.1f}",
            f"{run:.2f}",
        ]


def measure(case: Case, iterations: int) -> tuple[float, float, float]:
    """Milliseconds of an iteration and of the pruning step in it, seconds of the whole run."""
    torch.manual_seed(0)
    model = resnet18(case.side).cuda()
    images = torch.randn(4, BATCH, 3, case.side, case.side)
    labels = torch.randint(10, (4, BATCH))
    data = [
        (x.contiguous(memory_format=torch.channels_last).pin_memory(), y.pin_memory())
        for x, y in zip(images, labels, strict=True)
    ]
    method = Timed()
    torch.cuda.synchronize()
    began = time.perf_counter()
    drive.prune(
        model, data, nn.functional.cross_entropy, method=method, sparsity=0.98, iterations=iterations,
        autocast=case.autocast, capture=case.capture, progress=False,
    )  # fmt: skip
    torch.cuda.synchronize()
    run = time.perf_counter() - began
    marks = method.marks[SETTLED:]
    pairs = list(pairwise(marks))
    iteration = median(begin.elapsed_time(after) for (begin, _), (after, _) in pairs)
    step = median(end.elapsed_time(after) for (_, end), (after, _) in pairs)
    return iteration, step, run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, metavar="FILE", help="or a folder, for loop.md in it")
    parser.add_argument("--iterations", type=int, default=20)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device")
        return
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    facts = pages.facts("cuda")
    header = HEADER.format(
        device=facts["device"], facts=", ".join(f"{k} {v}" for k, v in facts.items() if k != "device"),
        batch=BATCH, iterations=options.iterations, first=SETTLED + 1,
    )  # fmt: skip
    measure(Case(32, None, False), SETTLED + 3)  # the libraries' first use
    lines: list[list[str]] = []
    for side, autocast, capture in product((32, 224), (None, torch.bfloat16), (False, True)):
        lines.append(Case(side, autocast, capture).cells(options.iterations))
        table = pages.markdown(COLUMNS, lines)
        if options.out:  # after every line: it can be stopped at any time
            out = options.out / "loop.md" if options.out.is_dir() else options.out
            write_atomic(out, f"{header}{table}\n".encode())
    print(f"{header}{table}")


if __name__ == "__main__":
    main()
