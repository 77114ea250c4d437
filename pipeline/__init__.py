"""From a folder of pairs to a trained, scored checkpoint."""
