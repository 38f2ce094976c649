"""Sparse layers and networks on CPU against dense ones.

python benchmarks/bench_sparse.py layers     3x3 convolutions called with [N, C, H, W], and in blocks
python benchmarks/bench_sparse.py linear     4096 x 4096, against oneDNN's packed weight and MKL's CSR too
python benchmarks/bench_sparse.py networks   whole networks, converted: inference, and a training step

Everything is validated before it is timed. Providers run in turns in one process, each twice, the second
call timed; medians. Two threads.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from functools import partial
from itertools import product

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import drive
from drive.bench import machine
from drive.models import Network
from drive.sparse.measure import interleaved
from drive_kernels import sparse

ops, ops_mkldnn = torch.ops.drive, torch.ops.mkldnn
SPARSITIES = (0.5, 0.8, 0.9, 0.95, 0.98, 0.993)
LAYERS = ((64, 32), (128, 16), (256, 8), (512, 4))  # channels, side
BATCHES = (32, 128)
LAST = torch.channels_last

Layer = Callable[[Tensor, Tensor], Tensor]


def forward(layer: Layer, x: Tensor, weight: Tensor) -> Callable[[], None]:
    def run() -> None:
        with torch.no_grad():
            layer(x, weight)

    return run


def backward(layer: Layer, x: Tensor, weight: Tensor) -> Callable[[], object]:
    """Forward, then the gradients to the input and to the weight."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight)]
    grad = torch.randn_like(layer(*leaves))
    return lambda: torch.autograd.grad(layer(*leaves), leaves, grad)


def pruned(shape: tuple[int, ...], sparsity: float) -> tuple[Tensor, Tensor]:
    mask = torch.rand(shape) >= sparsity
    return torch.randn(shape).masked_fill_(~mask, 0), mask


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max() + 1))


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


def layers(sparsities: list[float]) -> None:
    print("| C = O, plane, batch | sparsity | forward, blocked | with backward, blocked | dense ms |")
    print("| --- | --- | --- | --- | --- |")
    for batch, (channels, side), sparsity in product(BATCHES, LAYERS, sparsities):
        x = torch.randn(batch, channels, side, side)
        weight, mask = pruned((channels, channels, 3, 3), sparsity)
        pattern, values = sparse.pattern_of(mask), weight[mask]
        ours = partial(convolve, pattern=pattern, shape=list(mask.shape))
        blocks = ops.to_blocks(x)
        close(ours(x, values), dense_conv(x, weight))
        close(ops.from_blocks(ours(blocks, values), batch), dense_conv(x, weight))
        cells, times = [], []
        for way in (forward, backward):
            found = interleaved({
                "contiguous": way(dense_conv, x, weight),
                "channels_last": way(dense_conv, *(t.contiguous(memory_format=LAST) for t in (x, weight))),
                "ours": way(ours, x, values),
                "blocked": way(ours, blocks, values),
            })  # fmt: skip
            best = min(found["contiguous"], found["channels_last"])
            cells.append(f"{best / found['ours']:.1f}, {best / found['blocked']:.1f}")
            times.append(f"{best * 1e3:.2f}")
        row = (f"{channels}, {side}x{side}, {batch}", f"{sparsity:.1%}", *cells, " / ".join(times))
        print(f"| {' | '.join(row)} |", flush=True)


def linear(sparsities: list[float], size: int = 4096) -> None:
    print("| rows | sparsity | forward | MKL CSR forward | with backward | dense ms |")
    print("| --- | --- | --- | --- | --- | --- |")
    for rows, sparsity in product((1, 32, 256), sparsities):
        x, (weight, mask) = torch.randn(rows, size), pruned((size, size), sparsity)
        pattern, values = sparse.pattern_of(mask), weight[mask]
        packed, csr = ops_mkldnn._reorder_linear_weight(weight, rows), weight.to_sparse_csr()
        ours = partial(multiply, pattern=pattern, shape=list(mask.shape))
        close(ours(x, values), F.linear(x, weight))
        close(onednn(x, packed), F.linear(x, weight))
        one = interleaved({
            "linear": forward(F.linear, x, weight),
            "oneDNN": forward(onednn, x, packed),
            "csr": forward(mkl, x, csr),
            "ours": forward(ours, x, values),
        })  # fmt: skip
        two = interleaved({"linear": backward(F.linear, x, weight), "ours": backward(ours, x, values)})
        best = min(one["linear"], one["oneDNN"])
        row = (
            f"{rows}", f"{sparsity:.1%}", f"{best / one['ours']:.1f}", f"{best / one['csr']:.1f}",
            f"{two['linear'] / two['ours']:.1f}", f"{best * 1e3:.2f} / {two['linear'] * 1e3:.2f}",
        )  # fmt: skip
        print(f"| {' | '.join(row)} |", flush=True)


def training_step(model: nn.Module, x: Tensor, target: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), target).backward()
        optimizer.step()

    return step


def inference(model: nn.Module, x: Tensor, target: Tensor) -> Callable[[], None]:
    def run() -> None:
        with torch.no_grad():
            model(x)

    return run


def networks(sparsities: list[float], names: list[str], batches: list[int]) -> None:
    """Masks uniform over the convolutions; the speed-up counts the better dense layout."""
    print("| network, batch | sparsity | inference | training step | dense ms | sparse ms | chosen |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, batch, sparsity in product(names, batches, sparsities):
        torch.manual_seed(0)
        model = Network(name, 10, 3, 32).build()
        masks = drive.Masks({
            f"{n}.weight": torch.rand(layer.weight.shape) >= sparsity
            for n, layer in model.named_modules()
            if isinstance(layer, nn.Conv2d)
        }).apply_(model)  # fmt: skip
        x, target = torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))
        cells, dense_ms, ours_ms, chosen = [], [], [], []
        for training in (False, True):
            model.train(training)
            ours = drive.sparse.convert(model, masks, x)
            chosen.append(drive.sparse.report(ours).chosen)
            plain, last, ours = (
                copy.deepcopy(model),
                copy.deepcopy(model).to(memory_format=LAST),
                copy.deepcopy(ours),
            )
            close(copy.deepcopy(ours)(x).detach(), copy.deepcopy(plain)(x).detach())
            way = training_step if training else inference
            found = interleaved({
                "contiguous": way(plain, x, target),
                "channels_last": way(last, x.contiguous(memory_format=LAST), target),
                "ours": way(ours, x, target),
            })  # fmt: skip
            best = min(found["contiguous"], found["channels_last"])
            cells.append(f"{best / found['ours']:.2f}")
            dense_ms.append(f"{best * 1e3:.1f}")
            ours_ms.append(f"{found['ours'] * 1e3:.1f}")
        row = (
            f"{name}, {batch}", f"{sparsity:.1%}", *cells, " / ".join(dense_ms), " / ".join(ours_ms),
            " / ".join(chosen),
        )  # fmt: skip
        print(f"| {' | '.join(row)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time sparse layers and networks against dense ones.")
    parser.add_argument("what", choices=("layers", "linear", "networks"))
    parser.add_argument("--sparsities", nargs="+", type=float, default=list(SPARSITIES))
    parser.add_argument("--networks", nargs="+", default=["resnet18", "vgg16_bn"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32, 128])
    options = parser.parse_args()
    torch.set_num_threads(2)
    print(f"{machine()}\n\nSpeed-up over the best dense form.\n")
    if options.what == "networks":
        networks(options.sparsities, options.networks, options.batches)
    else:
        {"layers": layers, "linear": linear}[options.what](options.sparsities)


if __name__ == "__main__":
    main()
