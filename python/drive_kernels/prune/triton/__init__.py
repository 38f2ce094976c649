"""drive::prune_ and drive::prune_to_cost_ in Triton, for GPUs where the compiled kernels are missing."""
