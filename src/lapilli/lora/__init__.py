"""Low-rank adapters: inject and merge."""
