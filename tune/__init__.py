"""Which settings are best: Ray Tune runs the trials, Optuna proposes them."""
