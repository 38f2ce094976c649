"""A model on several ranks: where its shards lie, and one exact step over all of them."""
