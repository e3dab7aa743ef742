"""Replays the golden numbers of the original: `python -m tests.conformance`.

Knows the format of conformance/README.md and nothing about any particular case: whatever sets lie
under cases/ are run. Every number is made through names that a user has: `llava.*` as compat gives
it, and `lapilli.*` itself.
"""
