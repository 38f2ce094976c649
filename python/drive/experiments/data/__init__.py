"""Images with labels: from the network, from folders, in batches."""
