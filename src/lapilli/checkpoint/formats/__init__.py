"""File formats of checkpoints: weight files, small files, packed layers."""
