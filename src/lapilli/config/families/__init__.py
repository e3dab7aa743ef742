"""Language-model families."""
