"""Sparse layers and networks on CPU against dense ones."""
