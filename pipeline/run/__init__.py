"""What lies in the folder of a run: checkpoints, scores, history, record, pictures, lease."""
