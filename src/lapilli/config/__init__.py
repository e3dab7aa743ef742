"""Records of what a checkpoint is, and the parser of foreign config files. No torch."""
