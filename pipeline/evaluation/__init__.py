"""Evaluation actors, the scores that they give, and what they say of a run."""
