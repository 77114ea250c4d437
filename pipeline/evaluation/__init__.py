"""What measures a checkpoint: the actors that score it, what has them score, and LPIPS."""
