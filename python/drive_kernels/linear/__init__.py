"""Pruned layers on a GPU: weights behind a mask, packed with a bit an entry, in blocks."""

from . import block as block
from . import masked as masked
from . import packed as packed
