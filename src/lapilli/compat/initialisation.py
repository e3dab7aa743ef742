"""What programs call before loading (llava.utils)."""


def disable_torch_init() -> None:
    """Nothing: lapilli never initialises weights that it is about to read.

    Note: the original takes `reset_parameters` from Linear and LayerNorm for the whole process.
    """
