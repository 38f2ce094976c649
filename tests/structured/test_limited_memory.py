"""What does not fit when it is trained dense can be pruned to what does."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("torch_pruning")

# The system enforces the limit, on what is allocated (RLIMIT_DATA): nothing is sampled.
SCRIPT = """
import resource, sys
import torch
from torch import nn
from torch.nn import functional as F
import drive

torch.set_num_threads(1)
torch.manual_seed(0)
WIDTH, BATCH, LAYERS = 1024, 8192, 8
WEIGHTS = LAYERS * WIDTH * WIDTH * 4
x, y = torch.randn(BATCH, WIDTH), torch.randint(10, (BATCH,))

def train(model):
    optimizer = torch.optim.AdamW(model.parameters())
    F.cross_entropy(model(x), y).backward()
    optimizer.step()

def prune(model, pieces):
    return drive.prune(model, pieces, F.cross_entropy, method="snip", accumulate=len(pieces),
        structure="channels", sparsity=0.75, progress=False)

def allocated():
    found = next(line for line in open("/proc/self/status") if line.startswith("VmData"))
    return int(found.split()[1]) * 1024

# What a first step and a first pruning import is not the models'.
few = nn.Sequential(nn.Linear(WIDTH, 4), nn.ReLU(), nn.Linear(4, 10))
train(drive.shrink(few, prune(few, [(x[:2], y[:2])]), x[:2]).model)

limit = allocated() + int(float(sys.argv[2]) * WEIGHTS)
resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.RLIM_INFINITY))
layers = [layer for _ in range(LAYERS) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU())]
model = nn.Sequential(*layers, nn.Linear(WIDTH, 10))
if sys.argv[1] == "small":
    masks = prune(model, list(zip(x.split(256), y.split(256))))
    model = drive.shrink(model, masks, x[:2]).model
train(model)
"""


def under(limit: float, which: str) -> subprocess.CompletedProcess[str]:
    """Training of the dense or the smaller network; the limit is a multiple of the dense weights."""
    gives_back_at_once = {"MALLOC_MMAP_THRESHOLD_": str(2**20), "MALLOC_TRIM_THRESHOLD_": str(2**20)}
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, which, str(limit)],
        env={**os.environ, **gives_back_at_once},
        capture_output=True,
        text=True,
    )


def test_a_limit_that_dense_training_exceeds_holds_pruning_and_what_is_left():
    limit = 8.0  # times the weights: of these AdamW takes 4 (with gradients), the activations 8
    dense, small = under(limit, "dense"), under(limit, "small")
    assert dense.returncode and "can't allocate memory" in dense.stderr, dense.stderr
    assert small.returncode == 0, small.stderr
