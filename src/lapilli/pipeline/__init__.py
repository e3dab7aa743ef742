"""From a checkpoint to answers: `load(source) -> Chat`, then `ask`, `stream`, `batch`."""

from lapilli.pipeline.backend import ProcessedPrompt
from lapilli.pipeline.chat import Chat, load

__all__ = ["Chat", "ProcessedPrompt", "load"]
