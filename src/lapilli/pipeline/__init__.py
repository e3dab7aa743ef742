"""From a checkpoint to answers: `load(source) -> Chat`, then `ask`, `stream`, `batch`."""

from lapilli.pipeline.chat import Chat, load
from lapilli.pipeline.processor import ProcessedPrompt

__all__ = ["Chat", "ProcessedPrompt", "load"]
