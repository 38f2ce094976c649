"""drive::prune_, one exact global pruning step, and its pieces for tensors on several ranks."""

from . import op as op
from . import shards as shards
