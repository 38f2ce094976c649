"""Structured pruning: channels and heads that go as a whole, and the smaller models without them."""
