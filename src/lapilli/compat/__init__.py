"""Names of the original LLaVA over our own rooms, for programs that were written against it.

    import lapilli.compat
    lapilli.compat.install()
    from llava.model.builder import load_pretrained_model     # ours

or, without touching the program: `python -m lapilli.compat SCRIPT ARGS...`.

This room knows the names, argument orders and return values of the original and reproduces its
quirks (numbered as in the README of the golden numbers). All else is done by the rooms below.
"""

from lapilli.compat.install import install

__all__ = ["install"]
