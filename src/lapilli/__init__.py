"""lapilli: LLaVA, finished.

    import lapilli

    chat = lapilli.load("pebble")
    print(chat.ask("What is in this picture?", "drawing.png"))

Names are imported when they are first used: `import lapilli` alone does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from lapilli.errors import (
    BusyError,
    CheckpointError,
    ClosedError,
    ConfigError,
    ConfigFileError,
    ContextTooLongError,
    DataError,
    FusionError,
    GenerationError,
    GrammarError,
    LapilliError,
    MediaCountMismatchError,
    MediaError,
    MediaTooLargeError,
    MissingFileError,
    MissingWeightsError,
    ModelFailedError,
    PromptError,
    RequestError,
    ShapeMismatchError,
    StoreError,
    TemplateFileError,
    UnknownKeyError,
    UnsafeFileError,
    UnsupportedModelError,
)

if TYPE_CHECKING:
    from lapilli.config.generation import SamplingParams
    from lapilli.config.grammar import Grammar
    from lapilli.generate.output import Generation, Piece, TokenLogprob
    from lapilli.pipeline import Chat, load
    from lapilli.prompt.message import MediaPart, Message, TextPart

__version__ = "0.1.0"

__all__ = [
    "BusyError",
    "Chat",
    "CheckpointError",
    "ClosedError",
    "ConfigError",
    "ConfigFileError",
    "ContextTooLongError",
    "DataError",
    "FusionError",
    "Generation",
    "GenerationError",
    "Grammar",
    "GrammarError",
    "LapilliError",
    "MediaCountMismatchError",
    "MediaError",
    "MediaPart",
    "MediaTooLargeError",
    "Message",
    "MissingFileError",
    "MissingWeightsError",
    "ModelFailedError",
    "Piece",
    "PromptError",
    "RequestError",
    "SamplingParams",
    "ShapeMismatchError",
    "StoreError",
    "TemplateFileError",
    "TextPart",
    "TokenLogprob",
    "UnknownKeyError",
    "UnsafeFileError",
    "UnsupportedModelError",
    "__version__",
    "load",
]

_HOMES = {
    "Chat": "lapilli.pipeline",
    "Generation": "lapilli.generate.output",
    "Grammar": "lapilli.config.grammar",
    "MediaPart": "lapilli.prompt.message",
    "Message": "lapilli.prompt.message",
    "Piece": "lapilli.generate.output",
    "SamplingParams": "lapilli.config.generation",
    "TextPart": "lapilli.prompt.message",
    "TokenLogprob": "lapilli.generate.output",
    "load": "lapilli.pipeline",
}


def __getattr__(name: str) -> object:
    """Import a public name from its home."""
    if name not in _HOMES:
        raise AttributeError(f"module 'lapilli' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """Return the public names, imported or not."""
    return sorted(__all__)
