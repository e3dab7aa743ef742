"""Native CPU operations, each with a plain-torch reference that gives the same."""

from lapilli.kernels import ops

__all__ = ["ops"]
