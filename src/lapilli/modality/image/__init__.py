"""Pictures as a modality: decode, prepare, tower, projector, merge."""
