"""Comparisons of ways to rank and to fuse: baselines, data with a known optimum, and their tables.

A project that uses lapilli as a library, as pebble is: nothing of it is in the wheel.
"""
