"""Forward and backward as a CUDA graph: one launch in place of hundreds."""

from __future__ import annotations

import ctypes
import logging
import random
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from itertools import chain
from typing import Literal

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from .gradients import LossGradients
from .loss import Batch

Capture = bool | Literal["auto"]

WARM_UP = 3  # eager calls before the capture, as in PyTorch's recipe: libraries set themselves up in them
WORTHWHILE = 20  # iterations; with fewer, capturing takes longer than replaying saves
# After a capture that CUDA has invalidated, PyTorch puts itself in order since 2.13, and before 2.12 `_end`
# does. 2.12 remains in the midst of it, which is too much to risk for someone who did not ask.
RECOVERS = hasattr(torch._C, "_override_stale_capture_stream")
CAN_BE_ENDED = torch.__version__ < "2.12.0a0"

_log = logging.getLogger("drive.capture")  # the name that users know
_WAITS = "called a synchronizing CUDA operation"  # PyTorch's warning, in its sync debug mode
_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED


def check_capture(op: str, capture: object, device: torch.device) -> None:
    """Raise ValueError unless `capture` is True, False or "auto", and True only on CUDA."""
    if not isinstance(capture, bool) and capture != "auto":
        raise ValueError(f"{op}: capture must be True, False or 'auto', got {capture!r}")
    if capture is True and device.type != "cuda":
        raise ValueError(f"{op}: capture needs CUDA, the weights are on {device}")


@contextmanager
def captured(
    eager: LossGradients, capture: Capture, iterations: int
) -> Iterator[LossGradients | GraphedGradients]:
    """`eager`, or the same by a CUDA graph; then everything inside runs on a side stream.

    A graph cannot be captured on the default stream, and what it works on should be of its own stream.

    Args:
        eager: the gradients.
        capture: "auto": where it can be done and pays; why not is logged.
        iterations: about as many calls will be made.

    Raises:
        RuntimeError: capture is True and it cannot be done, with the reason.
    """
    if capture is False:
        yield eager
        return
    device, required = eager.device, capture is True
    if reason := _refusal(eager, iterations, required):
        if required:
            raise RuntimeError(_message(reason))
        _log.info(_message(reason))
        yield eager
        return
    outside, stream = torch.cuda.current_stream(device), _side_stream(device)
    stream.wait_stream(outside)
    graphed = GraphedGradients(eager, stream, required)
    try:
        with torch.cuda.stream(stream):
            yield graphed
            graphed.finish()
    finally:
        outside.wait_stream(stream)
        graphed.release()


def _refusal(eager: LossGradients, iterations: int, required: bool) -> str | None:
    """Why it is not even tried."""
    device = eager.device
    if device.type != "cuda":
        return f"the weights are on {device}"
    tensors = chain(eager.model.parameters(), eager.model.buffers())
    if elsewhere := sorted({str(t.device) for t in tensors if t.device != device}):
        return f"the model is on several devices: {', '.join([str(device), *elsewhere])}"
    if not required and iterations < WORTHWHILE:
        return f"it pays from {WORTHWHILE} iterations on, there are {iterations}"
    if not required and not RECOVERS and not CAN_BE_ENDED:
        return "PyTorch 2.12 cannot go on after a capture that fails; 2.13 and 2.11 can"
    return None


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all runs: cuBLAS keeps a workspace for every stream that it has ever seen."""
    return torch.cuda.Stream(device)


def _message(reason: str) -> str:
    return f"prune: forward and backward not captured as a CUDA graph: {reason}"


class GraphedGradients:
    """LossGradients; from the fourth batch of one shape on by replaying a CUDA graph of that call.

    The first calls are eager and count like all others: nothing has to be put back, and the results are those
    of eager calls throughout (the graph draws on from PyTorch's RNG, and updates buffers in place). Batches
    of other shapes are always computed eagerly. What Python decides is decided once, when it is captured;
    the last eager call is watched for what would then go wrong.

    Attributes:
        reason: why there will be no graph, or None.
        overwrites: a call overwrites the tensors that the last one returned.
    """

    def __init__(self, eager: LossGradients, stream: torch.cuda.Stream, required: bool):
        self.reason: str | None = None
        self._eager, self._stream, self._required = eager, stream, required
        self._seen: Counter[object] = Counter()  # batches by what a graph fixes of them
        self._shape: object = None
        self._inputs: list[Tensor] = []
        self._graph: torch.cuda.CUDAGraph | None = None
        self._grads: dict[str, Tensor] = {}

    @property
    def overwrites(self) -> bool:
        return self._graph is not None

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """As LossGradients.

        Raises:
            RuntimeError: the graph is required, and cannot be had.
        """
        if self.reason is not None:
            return self._eager(batch)
        leaves, structure = tree_flatten(batch)
        if misfits := list(filter(None, map(self._misfit, leaves))):
            self._give_up(f"a batch holds {misfits[0]}, where a graph takes plain tensors on the device")
            return self._eager(batch)
        shape = (str(structure), *((t.shape, t.stride(), t.dtype) for t in leaves))
        if self._graph is None:
            self._seen[shape] += 1
            if self._seen[shape] == WARM_UP:
                return self._watched(batch)
            if self._seen[shape] > WARM_UP:
                self._capture(leaves, structure)
                self._shape = shape
        if self._graph is None or shape != self._shape:
            return self._eager(batch)
        for own, new in zip(self._inputs, leaves, strict=True):
            own.copy_(new)
        self._graph.replay()
        return dict(self._grads)

    def finish(self) -> None:
        """Say so, or raise, if it was never captured."""
        if self._graph is None and self.reason is None:
            self._give_up(f"it takes more than {WARM_UP} batches of one shape")

    def release(self) -> None:
        """Free the graph and its memory."""
        if self._graph is not None:
            self._graph.reset()
        self._graph, self._inputs, self._grads = None, [], {}

    def _give_up(self, reason: str, cause: BaseException | None = None) -> None:
        self.reason = reason
        if self._required:
            raise RuntimeError(_message(reason)) from cause
        _log.warning(_message(reason))

    def _misfit(self, leaf: object) -> str | None:
        """What is wrong with a part of a batch."""
        if not isinstance(leaf, Tensor):
            return f"a {type(leaf).__name__}"
        if leaf.device != self._eager.device:
            return f"a tensor on {leaf.device}"
        if leaf.layout != torch.strided:
            return f"a tensor of layout {leaf.layout}"
        return "a tensor that requires a gradient" if leaf.requires_grad else None

    def _watched(self, batch: Batch) -> dict[str, Tensor]:
        """An eager call; gives up if it does what a graph would not repeat."""
        model = self._eager.model
        numbers, buffers = _cpu_rng(), dict(model.named_buffers())
        with _sync_warnings() as caught:
            found = self._eager(batch)
        waits = [f"{w.filename}:{w.lineno}" for w in caught if _WAITS in str(w.message)]
        replaced = [name for name, b in model.named_buffers() if buffers.get(name) is not b]
        if waits:
            self._give_up(f"the model or the loss waits for the device (.item(), say) at {waits[0]}")
        elif numbers != _cpu_rng():
            self._give_up("the model or the loss draws random numbers on the CPU")
        elif replaced:
            self._give_up(f"the model puts a new tensor in the place of its buffer {replaced[0]}")
        return found

    def _capture(self, leaves: list[Tensor], structure: TreeSpec) -> None:
        """Record a call on copies of the batch. If that fails, all is as before, and `reason` says why."""
        self._inputs = [leaf.clone() for leaf in leaves]
        self._graph = torch.cuda.CUDAGraph()
        failure: RuntimeError | None = None
        try:
            # thread_local: the threads of a DataLoader may pin memory meanwhile
            recording = torch.cuda.graph(self._graph, stream=self._stream, capture_error_mode="thread_local")
            with _stale_streams_overridden(), recording:
                try:
                    self._grads = self._eager(tree_unflatten(self._inputs, structure))
                except RuntimeError as error:
                    failure = error
        except RuntimeError as error:  # raised by ending it: knows less than what went wrong inside
            failure = failure or error
            if CAN_BE_ENDED:
                _end(self._graph, self._stream)
        if failure is not None:
            self.release()
            first_line = str(failure).partition("\n")[0]
            try:
                self._give_up(f"capturing failed: {first_line}", failure)
            finally:
                del failure  # its frames hold tensors of the model


def _end(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream) -> None:
    """End a capture that CUDA has invalidated, for PyTorch before 2.12.

    There, capture_end raises CUDA's error before it has told the RNG and the allocators: the next dropout
    raises, and the memory of the graph's pool does not come back. The stream, though, is out of the capture,
    so that an empty one can take the place of what was lost, and end as all do.

    Raises:
        RuntimeError: it cannot be ended, and this process should not go on.
    """
    try:
        begin = ctypes.CDLL("libcuda.so.1").cuStreamBeginCapture_v2
        begin.argtypes = (ctypes.c_void_p, ctypes.c_int)
        if error := begin(stream.cuda_stream, _RELAXED):
            raise RuntimeError(f"cuStreamBeginCapture returns {error}")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The CUDA Graph is empty")
            graph.capture_end()
    except (OSError, RuntimeError) as error:
        raise RuntimeError(
            f"prune: capturing a CUDA graph failed, and PyTorch {torch.__version__} cannot go on after it; "
            f"2.13 or later can, and capture=False does without: {error}"
        ) from error


def _cpu_rng() -> tuple[bytes, object]:
    return torch.get_rng_state().numpy().tobytes(), random.getstate()


@contextmanager
def _sync_warnings() -> Iterator[list[warnings.WarningMessage]]:
    """Collects the warnings of what happens inside, and with them PyTorch's of waiting for the device."""
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield caught
        finally:
            torch.cuda.set_sync_debug_mode(mode)


@contextmanager
def _stale_streams_overridden() -> Iterator[None]:
    """Capture although someone still holds a loss of before, whose stream autograd would wait for."""
    if not RECOVERS:
        yield
        return
    before = torch._C._override_stale_capture_stream()
    torch.autograd.graph.set_override_stale_capture_stream(True)
    try:
        yield
    finally:
        torch.autograd.graph.set_override_stale_capture_stream(before)
