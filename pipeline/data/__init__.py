"""From shards to batches: manifest, sample order, cache, pair reader, loader."""
