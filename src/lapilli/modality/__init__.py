"""What is seen: pictures and vectors, each behind the same protocol."""
