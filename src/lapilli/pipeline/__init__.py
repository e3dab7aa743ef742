"""From a checkpoint to answers: `load(source) -> Chat`, then `ask`, `stream`, `batch`."""

from lapilli.pipeline.chat import Chat, load
from lapilli.pipeline.ready import ReadyPrompt

__all__ = ["Chat", "ReadyPrompt", "load"]
