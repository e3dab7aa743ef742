"""What the command lines of the original conclude from a model's name, and their warning."""

import sys

from lapilli.prompt.choose import template_for_name


def choose_conversation(model_name: str, asked: str | None) -> str:
    """The template that was asked for, with a warning when the name says another; else that."""
    inferred, _ = template_for_name(model_name)
    if asked is None or asked == inferred:
        return inferred
    sys.stdout.write(
        f"[WARNING] the auto inferred conversation mode is {inferred}, while `--conv-mode` is "
        f"{asked}, using {asked}\n"
    )
    return asked
