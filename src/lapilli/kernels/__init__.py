"""Native CPU operations, each with a plain-torch reference that gives the same."""
