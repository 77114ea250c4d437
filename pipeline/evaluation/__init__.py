"""Evaluation actors, scores, image grids and the report."""
