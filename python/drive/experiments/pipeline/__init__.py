"""`drive pipeline`: sparsity in every stage of training, taken apart (arXiv 2312.01653)."""
