"""What does not fit when it is trained dense can be pruned to what does."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("torch_pruning")

SCRIPT = """
import ctypes, sys, threading, time
import torch
from torch import nn
from torch.nn import functional as F
import drive

class Resident(threading.Thread):
    "The most that is resident while it runs, beyond what was at first."
    def __init__(self):
        super().__init__(daemon=True)
        self.first, self.most, self.on = self.now(), 0, True
        self.start()
    @staticmethod
    def now():
        return int(open("/proc/self/statm").read().split()[1]) * 4096
    def run(self):
        while self.on:
            self.most = max(self.most, self.now() - self.first)
            time.sleep(0.001)

torch.set_num_threads(1)
torch.manual_seed(0)
WIDTH, BATCH = 1024, 4096
x, y = torch.randn(BATCH, WIDTH), torch.randint(10, (BATCH,))
layers = [layer for _ in range(8) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU())]
warm = nn.Linear(64, 64)  # what the first step of an optimizer and of a pruning import is not the models'
torch.optim.AdamW(warm.parameters()).step()
few = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
drive.shrink(few, drive.prune(few, [(torch.randn(4, 4), torch.arange(4) % 2)], F.cross_entropy, method="snip",
    structure="channels", sparsity=0.5, progress=False), torch.randn(1, 4))

watch = Resident()
model = nn.Sequential(*layers, nn.Linear(WIDTH, 10))
del layers
weights = sum(p.numel() * 4 for p in model.parameters())

def train(model):
    optimizer = torch.optim.AdamW(model.parameters())
    F.cross_entropy(model(x), y).backward()
    optimizer.step()

if sys.argv[1] == "small":
    pieces = list(zip(x.split(256), y.split(256)))
    masks = drive.prune(model, pieces, F.cross_entropy, method="snip", accumulate=16, structure="channels",
        sparsity=0.75, progress=False)
    model = drive.shrink(model, masks, x[:2]).model
train(model)
watch.on = False
print(watch.most / weights)
"""


def most(which: str) -> float:
    """Resident memory, as a multiple of the dense weights."""
    done = subprocess.run([sys.executable, "-c", SCRIPT, which], check=True, capture_output=True, text=True)
    return float(done.stdout)


def test_a_limit_that_dense_training_exceeds_holds_pruning_and_what_is_left():
    limit = 8.0  # times the weights: with gradients AdamW takes 4, and activations as much again or more
    assert most("dense") > limit
    assert most("small") < limit
