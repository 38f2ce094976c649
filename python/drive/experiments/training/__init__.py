"""Training networks, dense or pruned: recipes, the loop, its checkpoints and history."""
