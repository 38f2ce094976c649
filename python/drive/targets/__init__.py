"""What is pruned: tensors by name, groups that share a ranking, structures that go as one."""

from .targets import prunable as prunable
