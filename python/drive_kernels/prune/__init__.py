"""drive::prune_, one exact global pruning step, its pieces for tensors on several ranks, and masks held."""

from . import cost as cost
from . import op as op
from . import shards as shards
from . import zero as zero
