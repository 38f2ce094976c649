"""Inference of one masked network by whoever is installed: functions from a model and its input to a call.

All compute in float32 on as many threads as torch has, and wait for work as they do by default (turns.py).
A rival that is not there, or cannot run the network, is the reason why, in one line.
"""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from drive import sparse
from drive.experiments.runs.inputs import one_line
from drive.masks import Masks

Run = Callable[[], Tensor]
Rival = Callable[[nn.Module, Tensor], Run]

OURS, CONTIGUOUS, CHANNELS_LAST = "ours", "torch", "torch channels_last"
ONNX_RUNTIME, OPENVINO = "ONNX Runtime", "OpenVINO"
OPSET = 13  # the newest one that all rivals read


def ours(model: nn.Module, masks: Masks, example: Tensor) -> Run:
    """`drive.sparse.freeze`."""
    plan = sparse.freeze(model, masks, example)

    def run() -> Tensor:
        found: Tensor = plan(example)
        return found

    return run


def contiguous(model: nn.Module, example: Tensor) -> Run:
    """The model as it is."""

    def run() -> Tensor:
        with torch.inference_mode():
            found: Tensor = model(example)
        return found

    return run


def channels_last(model: nn.Module, example: Tensor) -> Run:
    """A copy whose weights, and input, have their channels last."""
    last: Any = torch.channels_last  # torch's annotations lack a module's memory_format with a tensor's
    return contiguous(copy.deepcopy(model).to(memory_format=last), example.contiguous(memory_format=last))


def onnx_runtime(model: nn.Module, example: Tensor) -> Run:
    """A session with all optimisations of the graph."""
    onnxruntime: Any = import_module("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(
        to_onnx(model, example), options, providers=["CPUExecutionProvider"]
    )
    feed = {session.get_inputs()[0].name: example.numpy()}
    return lambda: torch.from_numpy(session.run(None, feed)[0])


def openvino(model: nn.Module, example: Tensor) -> Run:
    """Compiled for the least latency, in float32 where it would choose less."""
    core: Any = import_module("openvino").Core()
    options = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    compiled = core.compile_model(core.read_model(to_onnx(model, example)), "CPU", options)
    request, feed = compiled.create_infer_request(), {0: example.numpy()}
    return lambda: torch.from_numpy(request.infer(feed, share_inputs=True, share_outputs=True)[0])


DENSE: dict[str, Rival] = {
    CONTIGUOUS: contiguous,
    CHANNELS_LAST: channels_last,
    ONNX_RUNTIME: onnx_runtime,
    OPENVINO: openvino,
}


def made(make: Callable[..., Run], *arguments: Any) -> Run | str:
    """A call, once tried; or why there is none."""
    try:
        run = make(*arguments)
        run()
    except Exception as error:  # whatever a foreign library raises for a network that it cannot run
        return one_line(error)
    return run


def difference(output: Tensor, expected: Tensor) -> float:
    """How far an output is from the dense network's, relative to its largest entry."""
    least = torch.finfo(expected.dtype).tiny  # a network may be so sparse that all it says is 0
    return float((output - expected).abs().max() / expected.abs().max().clamp_min(least))


def to_onnx(model: nn.Module, example: Tensor) -> bytes:
    """The model for just this shape, by the exporter that traces, whose graphs every rival reads.

    Raises:
        ImportError: onnx is not installed.
    """
    import_module("onnx")  # else the exporter says so only at the end, in words of its own
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter is deprecated, and says so in several ways
        torch.onnx.export(model, (example,), file, dynamo=False, opset_version=OPSET)  # type: ignore[arg-type]
    return file.getvalue()
