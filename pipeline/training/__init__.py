"""The training loop, the engine around DeepSpeed, and what a run shows of itself."""
