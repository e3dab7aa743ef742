"""Native CPU operations: for each a plain-torch reference and a compiled path that gives the same."""
