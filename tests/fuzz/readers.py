"""What a user does with a folder: every reader takes the honest folder, one file of it damaged."""

from pathlib import Path

import PIL.Image

import lapilli
from lapilli.checkpoint.inspect import inspect_checkpoint
from lapilli.config.generation import EngineOptions
from lapilli.errors import LapilliError

# Memory for keys and values is reserved for the whole context, and used as it is needed.
SMALL = EngineOptions(max_rows=1, kv_bytes=64 << 20)
PICTURE = PIL.Image.new("RGB", (40, 30), (200, 30, 30))


def load_and_ask(folder: Path) -> None:
    """Inspect and load; where that goes well, ask twice.

    A question may be refused with any error of ours: its options come from the files too.
    """
    inspect_checkpoint(folder / "model").to_text()
    chat = lapilli.load(folder / "model", device="cpu", dtype="float32", engine=SMALL)
    try:
        pictures = [PICTURE] if chat.config.vision is not None else []
        chat.ask("What is <s> in  it? 12", *pictures, max_new_tokens=2)
        chat.ask("And then?", max_new_tokens=1)
    except LapilliError:
        pass
