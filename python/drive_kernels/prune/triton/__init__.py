"""drive::prune_ in Triton, for GPUs where the compiled kernels are missing."""
