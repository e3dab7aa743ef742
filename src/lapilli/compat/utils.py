"""What programs call before loading (llava.utils)."""


def disable_torch_init() -> None:
    """Do nothing: lapilli never initialises weights that it is about to read."""
