"""Sparse layers and networks on CPU against dense ones: rows in a file, from which report.py draws.

python -m benchmarks.cpu.sparse.measure --out docs/results/sparse-cpu.jsonl [layers] [linear] [networks]

layers      3x3 convolutions called with [N, C, H, W], and in blocks; beside them a copy of their input, whose
            time no forward that reads its input and writes its output undercuts. Each in turns of one call,
            which finds no cache as it left it, and again in turns of many calls in a row
linear      4096 x 4096, against oneDNN's packed weight and MKL's CSR too
networks    whole networks, converted: inference, and a training step with its optimizer

Everything is validated before it is timed. Providers run in turns in one process
(drive.sparse.measure.interleaved), those of a network at all sparsities in the same turns. Two threads. Rows
name the commit that last changed what they measure: those of this version are measured again only
where something else disturbed them (rows.py), those of another are replaced.

The allocator keeps what is freed. With glibc's habit of handing large pieces back, pages are mapped and
zeroed anew in each training step: 33,000 of a dense MLP, 400,000 of a ResNet-18 at batch 128, some hundreds
at most of their sparse forms; and it changes within a process which of two equal networks pays, so that
MLPs came out up to 1.7 times apart.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import math
from collections.abc import Callable
from functools import cache, partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import drive
from benchmarks.cpu.sparse.networks import NETWORKS, drive_masks, uniform_masks
from benchmarks.cpu.sparse.rows import (
    CONVOLUTION,
    FIRST,
    IN_A_ROW,
    LINEAR,
    NETWORK,
    TOLERATED,
    Rows,
    best_dense,
)
from benchmarks.layers import MODES, Run, backward, close, forward, inference, pruned, rival
from drive.sparse.laid_out import OneDnnLinear
from drive.sparse.measure import interleaved
from drive_kernels.sparse.pattern import pattern_of

ops, ops_mkldnn = torch.ops.drive, torch.ops.mkldnn
SPARSITIES = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.993)
LAYERS = ((64, 32), (128, 16), (256, 8), (512, 4))  # channels, side
FEATURES = 4096
LAST = torch.channels_last

# Of turns for each layer and each network, 5 to 15 turns. On a shared host equal dense networks of 1 to 2 s a
# call came out up to 16 % off the first in 3 turns, up to 4 % in 8 (four sets of six, in a fixed order).
LAYER_SECONDS, NETWORK_SECONDS = 1.0, 12.0
TURN_SECONDS = 0.1  # of calls in a row: hundreds where the first one, after others, takes much longer


def dense_conv(x: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(x, weight, None, 1, 1)


def convolve(x: Tensor, values: Tensor, pattern: list[Tensor], shape: list[int]) -> Tensor:
    return ops.sparse_conv2d(x, values, pattern, None, shape, [1, 1], [1, 1], [1, 1], 1)


def onednn(x: Tensor, packed: Tensor) -> Tensor:
    return ops_mkldnn._linear_pointwise(x, packed, None, "none", [], "")


def mkl(x: Tensor, csr: Tensor) -> Tensor:
    return (csr @ x.t()).t()


def multiply(x: Tensor, values: Tensor, pattern: list[Tensor], shape: list[int]) -> Tensor:
    return ops.sparse_linear(x, values, pattern, None, shape)


def sparseprop(layer: nn.Conv2d | nn.Linear, x: Tensor, weight: Tensor) -> dict[str, nn.Module]:
    """The kernels of IST-DASLab/sparseprop (arXiv 2302.04852), if that is installed; it is no dependency."""
    if find_spec("sparseprop") is None:
        return {}
    from sparseprop.modules import SparseConv2d, SparseLinear

    with torch.no_grad():
        layer.weight.copy_(weight)
        expected = layer(x)
    if isinstance(layer, nn.Linear):
        found = {"SparseProp": SparseLinear.from_dense(layer)}
    else:
        found = {f"SparseProp, {name}": SparseConv2d.from_dense(layer, over)
                 for name, over in (("batch", False), ("width", True))}  # fmt: skip
    for module in found.values():
        close(module(x).detach(), expected)
    return found


def in_a_row(runs: dict[str, Run], calls: dict[str, int]) -> dict[str, float]:
    """Seconds a call, in turns of so many calls: caches are as the call before has left them."""

    def turn(who: str) -> None:
        for _ in range(calls[who]):
            runs[who]()

    seconds = interleaved({who: partial(turn, who) for who in runs}, seconds=LAYER_SECONDS)
    return {who: seconds[who] / calls[who] for who in runs}


def with_faster_kernel(seconds: dict[str, float]) -> dict[str, float]:
    """One of SparseProp's kernels is far slower than the other; which one depends on the plane."""
    kernels = [seconds.pop(name) for name in list(seconds) if name.startswith("SparseProp")]
    return seconds | ({"SparseProp": min(kernels)} if kernels else {})


def layers(rows: Rows, sparsities: list[float], batches: list[int]) -> None:
    for batch, (channels, side), sparsity in product(batches, LAYERS, sparsities):
        key = f"{channels}-{channels}, {side}x{side}", batch, sparsity
        if not any(rows.missing(what, *key, mode) for what, mode in product((CONVOLUTION, IN_A_ROW), MODES)):
            continue
        x = torch.randn(batch, channels, side, side)
        weight, mask = pruned((channels, channels, 3, 3), sparsity)
        pattern, values = pattern_of(mask), weight[mask]
        ours = partial(convolve, pattern=pattern, shape=list(mask.shape))
        blocks = ops.to_blocks(x)
        close(ours(x, values), dense_conv(x, weight))
        close(ops.from_blocks(ours(blocks, values), batch), dense_conv(x, weight))
        last = [t.contiguous(memory_format=LAST) for t in (x, weight)]
        layer = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        # with 512 channels and nothing pruned SparseProp's backward crashes
        rivals = sparseprop(layer, x, weight) if sparsity else {}
        for mode, way in MODES.items():
            runs = {
                "dense": way(dense_conv, x, weight),
                "again": way(dense_conv, x, weight),
                "dense channels_last": way(dense_conv, *last),
                "copy": partial(torch.empty_like(x).copy_, x),
                "ours": way(ours, x, values),
                "ours, blocked": way(ours, blocks, values),
                **{name: rival(module, x, mode) for name, module in rivals.items()},
            }
            seconds = interleaved(runs, seconds=LAYER_SECONDS)
            calls = {who: 1 + int(TURN_SECONDS / each) for who, each in seconds.items()}
            rows.add(CONVOLUTION, *key, mode, seconds=with_faster_kernel(seconds))
            rows.add(IN_A_ROW, *key, mode, seconds=with_faster_kernel(in_a_row(runs, calls)))


def linear(rows: Rows, sparsities: list[float], batches: list[int]) -> None:
    for batch, sparsity in product(batches, sparsities):
        key = LINEAR, f"{FEATURES}x{FEATURES}", batch, sparsity
        if not any(rows.missing(*key, mode) for mode in MODES):
            continue
        x, (weight, mask) = torch.randn(batch, FEATURES), pruned((FEATURES, FEATURES), sparsity)
        pattern, values = pattern_of(mask), weight[mask]
        packed, csr = ops_mkldnn._reorder_linear_weight(weight, batch), weight.to_sparse_csr()
        ours = partial(multiply, pattern=pattern, shape=list(mask.shape))
        close(ours(x, values), F.linear(x, weight))
        close(onednn(x, packed), F.linear(x, weight))
        rivals = sparseprop(nn.Linear(FEATURES, FEATURES, bias=False), x, weight)
        rows.add(*key, "forward", seconds=interleaved({
            "dense": forward(F.linear, x, weight),
            "dense oneDNN": forward(onednn, x, packed),
            "MKL CSR": forward(mkl, x, csr),
            "ours": forward(ours, x, values),
            **{name: rival(module, x, "forward") for name, module in rivals.items()},
        }, seconds=LAYER_SECONDS))  # fmt: skip
        rows.add(*key, "forward + backward", seconds=interleaved({
            "dense": backward(F.linear, x, weight),
            "ours": backward(ours, x, values),
            **{name: rival(module, x, "backward") for name, module in rivals.items()},
        }, seconds=LAYER_SECONDS))  # fmt: skip


def training_step(model: nn.Module, x: Tensor) -> Run:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    model.train()

    def step() -> None:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    return step


WAYS = {"inference": inference, "training step": training_step}


def dense_rivals(build: Callable[[], nn.Module], x: Tensor, mode: str, compiled: bool) -> dict[str, Run]:
    """The sparsity makes no difference to them. "again": how much two measurements of one thing differ."""
    way, rows = WAYS[mode], x.numel() // x.shape[-1]
    rivals = {"dense": way(build(), x), "again": way(build(), x)}
    if x.dim() == 4:
        rivals["dense channels_last"] = way(build().to(memory_format=LAST), x.contiguous(memory_format=LAST))
    elif mode == "inference":  # F.linear is MKL's
        plain = build()
        onednn = with_linear(plain, partial(OneDnnLinear.from_dense, rows=rows))
        with torch.no_grad():
            close(onednn(x), plain(x))
        rivals["dense oneDNN"] = inference(onednn, x)
    if compiled:
        torch._dynamo.reset()
        rivals["torch.compile"] = way(torch.compile(build()), x)
    return rivals


class CsrLinear(nn.Module):
    """What torch.sparse offers."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.weight, self.bias = layer.weight.detach().to_sparse_csr(), layer.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        return mkl(x.flatten(0, -2), self.weight).view(*x.shape[:-1], -1) + self.bias


def with_linear(model: nn.Module, kind: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    """A copy whose Linear are of another kind."""
    found = copy.deepcopy(model)
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            found.set_submodule(name, kind(layer))
    return found


def seeded(network: str) -> nn.Module:
    torch.manual_seed(0)
    return NETWORKS[network][0]()


@cache
def masks_of(name: str, sparsity: float) -> drive.Masks:
    network, _, kind = name.partition(", ")
    return (drive_masks if kind else uniform_masks)(seeded(network), sparsity)


def slower(dense: dict[str, Run], ours: Run) -> float:
    """How many times as long as the best dense one takes, in 15 turns with no others in them."""
    seconds = interleaved({**dense, "ours": ours}, seconds=math.inf)
    return seconds["ours"] / best_dense(seconds)


def networks(
    rows: Rows, sparsities: list[float], batches: list[int], names: list[str], compiled: list[int]
) -> None:
    """The speed-up counts the better dense layout, whatever the model was given in.

    Among hundreds of figures some are low by chance: one below TOLERATED is measured again, and that counts;
    the row keeps the other one beside it.
    """
    for name, batch, mode in product(names, batches, WAYS):
        network = name.partition(", ")[0]
        wanted = [s for s in sparsities if rows.missing(NETWORK, name, batch, s, mode)]
        if not wanted:
            continue
        build, shape = NETWORKS[network]
        x = torch.randn(batch, *shape)
        rivals = dense_rivals(build, x, mode, batch in compiled)
        dense = {who: run for who, run in rivals.items() if who.startswith("dense")}
        ours: dict[str, Run] = {}
        csr: dict[str, Run] = {}
        chosen = {}
        for sparsity in wanted:
            masks, model = masks_of(name, sparsity), seeded(network)
            masks.apply_(model)
            model.train(mode == "training step")
            converted = copy.deepcopy(drive.sparse.convert(model, masks, x))
            expected = copy.deepcopy(model)(x).detach()
            close(copy.deepcopy(converted)(x).detach(), expected)
            ours[f"ours {sparsity}"] = WAYS[mode](converted, x)
            chosen[sparsity] = drive.sparse.report(converted).chosen
            if mode == "inference" and x.dim() < 4:
                of_csr = with_linear(model, CsrLinear)
                close(of_csr(x).detach(), expected)
                csr[f"MKL CSR {sparsity}"] = inference(of_csr, x)
        seconds = interleaved({**rivals, **ours}, seconds=NETWORK_SECONDS)
        if csr:  # up to 39 times as long as dense where nothing is pruned: not in turns with the others
            apart = interleaved({"dense": rivals["dense"], **csr}, seconds=NETWORK_SECONDS)
            seconds |= {who: seconds["dense"] * apart[who] / apart["dense"] for who in csr}
        for sparsity in wanted:
            found = {who: seconds[who] for who in rivals}
            found["ours"] = seconds[f"ours {sparsity}"]
            if best_dense(found) < TOLERATED * found["ours"]:
                found[FIRST] = found["ours"]
                found["ours"] = best_dense(found) * slower(dense, ours[f"ours {sparsity}"])
            if csr:
                found["MKL CSR"] = seconds[f"MKL CSR {sparsity}"]
            rows.add(NETWORK, name, batch, sparsity, mode, seconds=found, chosen=chosen[sparsity])


def keep_freed_memory() -> None:
    """Of glibc's malloc.h: no piece by mmap (M_MMAP_MAX, 0), nothing handed back (M_TRIM_THRESHOLD, -1)."""
    mallopt = ctypes.CDLL(None).mallopt
    if not (mallopt(-4, 0) and mallopt(-1, -1)):
        raise RuntimeError("measure.py: mallopt must set M_MMAP_MAX and M_TRIM_THRESHOLD, got a refusal")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="*", default=["layers", "linear", "networks"])
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--sparsities", nargs="+", type=float, default=list(SPARSITIES))
    parser.add_argument("--networks", nargs="+", default=[*NETWORKS, "resnet18, DRIVE", "vgg16_bn, DRIVE"])
    parser.add_argument("--batches", nargs="+", type=int)
    parser.add_argument("--compiled", nargs="*", type=int, default=[32], help="batches for torch.compile")
    options = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(2)
    torch.manual_seed(0)
    rows = Rows(options.out)
    if "layers" in options.what:
        layers(rows, options.sparsities, options.batches or [32, 128])
    if "linear" in options.what:
        linear(rows, options.sparsities, options.batches or [1, 32, 256])
    if "networks" in options.what:
        batches = options.batches or [32, 1, 128]
        networks(rows, options.sparsities, batches, options.networks, options.compiled)


if __name__ == "__main__":
    main()
