"""Accuracy against speed of networks that were pruned to a budget of multiply-adds, or to a count."""
