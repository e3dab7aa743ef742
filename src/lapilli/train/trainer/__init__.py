"""The trainer: batches, loss, steps, the loop, its checkpoints and its metrics."""
