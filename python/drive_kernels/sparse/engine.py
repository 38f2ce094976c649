"""drive::engine_* - whole networks by their non-zeros, in lanes that are never neighbours
(csrc/sparse/engine).

Written by and for drive.sparse.frozen, which plans; there is no version of these ops but the compiled one.
"""

from drive_kernels.library import library

library.define(
    "engine_pack("  # a convolution's non-zeros in the order in which the loops walk them
    "Tensor weight, "  # [O, C / groups, kh, kw] float32
    "int groups, "
    "int block, int in_block, "  # output channels, and input channels of a group, that are together
    "int[2] padding, int[2] dilation, "
    "int[2] field"  # of the input: channels, vectors a row with its borders
    ") -> (Tensor taps, Tensor counts, Tensor starts)"  # [nnz, 2] int32 (bytes, float32), int32, int64
)
library.define("engine_sums() -> int")  # positions whose sums fit the registers
library.define("engine_arena(int bytes) -> Tensor")  # [bytes] uint8, not initialised
library.define(
    "engine_run(Tensor(a!)[] plain, Tensor program, Tensor phases, int chained, Tensor[] constants, "
    "Tensor(b!) arena, int[2] sums, int batch, int threads) -> ()"
)
