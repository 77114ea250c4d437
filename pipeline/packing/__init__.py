"""From photographs to packed shards."""
