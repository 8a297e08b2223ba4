"""From shards to batches, in worker processes: sources, mixtures, labels, and what is counted of them."""
