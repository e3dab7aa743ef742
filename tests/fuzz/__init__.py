"""Hostile files: a table of kinds (`table.py`), and a child process in which they are read."""
