"""Training of the original; see below."""
