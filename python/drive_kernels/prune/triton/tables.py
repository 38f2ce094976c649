"""The table: one tensor of int64 with all that the kernels need to know, and where it lies in it."""

from __future__ import annotations

import torch
import triton.language as tl

# First its header. Costs and scales are 1, and the kernels read none, unless they are COSTED.
ITEMS = tl.constexpr(0)
TOTAL = tl.constexpr(1)  # what all entries cost
CHUNKS = tl.constexpr(2)
PLAIN_CHUNKS = tl.constexpr(3)
BUDGET = tl.constexpr(4)  # what survivors may cost
MIN_KEEP = tl.constexpr(5)
GUARDED = tl.constexpr(6)  # what those cost that survive in any case because of min_keep
SQUARED = tl.constexpr(7)  # 1: |S| is the square of the score that is ranked, 0: it is that score
SAMPLES = tl.constexpr(8)
CAPACITY = tl.constexpr(9)  # of the list of keys inside the bracket
LISTED = tl.constexpr(10)  # keys that were to go there
SELECTION = tl.constexpr(11)  # where the state of the global selection lies in the table
GUARDS = tl.constexpr(12)  # where the items' states lie, if min_keep > 0
HEADER = tl.constexpr(13)

# Then a row an item, which is one tensor with its gradients and its mask.
WEIGHT = tl.constexpr(0)  # addresses
GRAD = tl.constexpr(1)
MASK_GRAD = tl.constexpr(2)  # 0: there is none
MASK = tl.constexpr(3)
DTYPE = tl.constexpr(4)
NUMEL = tl.constexpr(5)
FIRST = tl.constexpr(6)  # global index of its first entry
FIRST_CHUNK = tl.constexpr(7)
PLAIN = tl.constexpr(8)  # so many of its chunks, from the first on, are plain: see `plain_chunk`
PLAIN_BEFORE = tl.constexpr(9)  # plain chunks of the items before
WALK = tl.constexpr(10)  # where the dimensions of its walk lie in the table: order of the weight's memory
DIMS = tl.constexpr(11)  # how many there are
LOGICAL_WALK = tl.constexpr(12)  # the same for the row-major order; the same place if the order is the same
LOGICAL_DIMS = tl.constexpr(13)
COST = tl.constexpr(14)  # of each of its entries
COST_BEFORE = tl.constexpr(15)  # of the items before
GRAD_SCALE = tl.constexpr(16)  # float32s by which gradients and products are multiplied, as integers
PRODUCT_SCALE = tl.constexpr(17)
ROW = tl.constexpr(18)

FLOAT32 = tl.constexpr(0)
BFLOAT16 = tl.constexpr(1)
FLOAT16 = tl.constexpr(2)
FLOAT64 = tl.constexpr(3)
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}

# Then the states of the selections, the global one and with min_keep one an item.
# Wanted: the rank-th largest of the keys with the prefix; at last: ties that survive. Of the global selection
# both are costs: the key is the one with which those of the largest, added up, reach the rank.
RANK = tl.constexpr(0)
KEY = tl.constexpr(1)  # the prefix, digits found so far; at last the threshold
EQUAL = tl.constexpr(2)  # entries on the threshold, or what they cost
SHIFT = tl.constexpr(3)  # of the next digit; negative: the threshold is found
PLACE = tl.constexpr(4)  # of the threshold, one of those below
CUT = tl.constexpr(5)  # global index up to which ties survive
CUT_CHUNK = tl.constexpr(6)  # the chunk where that is decided; -1: all ties survive
CUT_RANK = tl.constexpr(7)  # ties of that chunk that survive
LOW = tl.constexpr(8)  # the bracket
HIGH = tl.constexpr(9)
NEXT = tl.constexpr(10)  # where no tie survives, the least key above the threshold; LAST: there is none
STATE = tl.constexpr(11)

ON_HIGH = tl.constexpr(0)
ON_LOW = tl.constexpr(1)
INSIDE = tl.constexpr(2)
ANYWHERE = tl.constexpr(3)

# Last the dimensions of the walks, innermost first: size; strides of weight, gradient, mask, mask gradient.
DIM = tl.constexpr(5)

# What the survey counts in each chunk, beside keys ON_HIGH, ON_LOW and INSIDE.
ABOVE = tl.constexpr(3)
ALIVE = tl.constexpr(4)
NONFINITE = tl.constexpr(5)
COUNTS = tl.constexpr(6)

# What it leaves of each entry of a plain chunk, in two bits: 0, or one of these.
SURE = tl.constexpr(1)  # on HIGH, above it, or guarded
OPEN = tl.constexpr(2)  # inside the bracket: its key is listed

# Keys are those of csrc/prune/key.h. Digits are shorter: tl.histogram takes time for every bucket.
DIGIT_BITS = tl.constexpr(8)
BUCKETS = tl.constexpr(256)
TOP32 = tl.constexpr(0x7F800001)  # above every finite score's key
TOP64 = tl.constexpr(0x7FF0000000000001)
LAST = tl.constexpr(0x7FFFFFFFFFFFFFFF)
