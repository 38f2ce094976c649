"""One step of drive::prune_ on a GPU: whether it is right, how fast it is, what it takes."""
