"""Modalities: pictures and vectors, each behind the same protocol."""
