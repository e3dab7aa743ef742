"""Native CPU operations, each with a plain-torch reference that gives the same.

The import registers the custom ops torch.ops.lapilli.*.
"""

from lapilli.kernels import attention, layer, linear

__all__ = ["attention", "layer", "linear"]
