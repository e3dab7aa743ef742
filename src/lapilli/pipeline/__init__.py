"""From a checkpoint to answers: `load(source) -> Chat`, then `ask`, `stream`, `batch`, `decide`."""

from lapilli.pipeline.backend import ProcessedPrompt
from lapilli.pipeline.chat import Chat, load
from lapilli.pipeline.questions import Choice, Decisions, Level, Option, Predicate, Refusal, Score
from lapilli.pipeline.wording import Wording

__all__ = [
    "Chat",
    "Choice",
    "Decisions",
    "Level",
    "Option",
    "Predicate",
    "ProcessedPrompt",
    "Refusal",
    "Score",
    "Wording",
    "load",
]
