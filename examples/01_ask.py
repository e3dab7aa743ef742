"""Ask about a picture, then follow up.

python examples/01_ask.py [MODEL [PICTURE]]
"""

import sys
from pathlib import Path

import lapilli

PICTURE = Path(__file__).parent / "picture.png"


def main(model: str = "pebble", picture: str = str(PICTURE)) -> None:
    chat = lapilli.load(model)
    print(chat.ask("What is in this picture?", picture))
    # No picture: the question follows the conversation, and the picture is not encoded again.
    for piece in chat.stream("And what is left of it?", max_new_tokens=64):
        print(piece, end="", flush=True)
    print()


if __name__ == "__main__":
    main(*sys.argv[1:])
