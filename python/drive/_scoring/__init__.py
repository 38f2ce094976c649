"""How gradients come about, and what must be as before once a model has been scored."""
