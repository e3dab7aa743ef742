"""Language-model families: the facts that every other file asks for by `model_type`.

A family does not compute anything. What its layers do is said by the record that `parse` returns
(config/model.py) and done by the module that is built from it (lm/).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from lapilli.config import ignored
from lapilli.config.model import TextConfig
from lapilli.config.reader import KeyReader


@dataclass(frozen=True, kw_only=True)
class Family(ABC):
    """A language-model family.

    Attributes:
        model_type: of its config.json, and of a `text_config`.
        original: model_type and class of a LLaVA of it in the original layout.
        marks: what tells it by the class name in old files, whose model_type is only "llava".
        template: the conversation template of checkpoints that do not say which, if there is one
            that belongs to the family.
        template_first: the template counts even where the vocabulary speaks for another one.
        stem: what names of its tensors begin with.
        slow_tokenizer: the original reads its tokenizer.model, not its tokenizer.json.
        in_hf_llava: transformers' LLaVA classes take it as their `text_config`.
        ignored: keys of its config.json that are knowingly not read.
    """

    model_type: str
    original: tuple[str, str]
    marks: tuple[str, ...] = ()
    template: str | None = None
    template_first: bool = False
    stem: str = "model"
    slow_tokenizer: bool = False
    in_hf_llava: bool = True
    ignored: frozenset[str] = ignored.TEXT

    @abstractmethod
    def parse(self, reader: KeyReader, *, tied: bool | None = None) -> TextConfig:
        """Return the language model that the reader's keys describe.

        Args:
            reader: keys of a plain config.json, of a LLaVA config.json or of a `text_config`.
            tied: whether the output layer is the embedding, when the caller knows better than the
                file.

        Raises:
            ConfigError: a key is missing or of the wrong type.
            UnsupportedModelError: a variation of the family that lapilli does not have.
        """

    @abstractmethod
    def is_tied(self, reader: KeyReader) -> bool:
        """Return whether the keys say that the output layer is the embedding."""

    @abstractmethod
    def write(self, text: TextConfig) -> dict[str, object]:
        """Return the keys of a language model, as `parse` reads them.

        Raises:
            UnsupportedModelError: something about it that the family has no key for.
        """
