"""Writing a checkpoint: one file per layout, and what they share."""
