"""Text: a text through a language model of its own, compressed into its last hidden states.

    "a long description"  --tokenizer--> ids [n]  --encoder--> [n, E] --last T--> [T, E]
    --projector--> [T, D]                                    or the means of T stretches

Source: Guoyao Li et al. 2025 (MixLM): an item is the last T_S hidden states of an encoder, which
stand in the prompt of the ranking model as they are.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from lapilli.config.modalities import TextEncoderConfig
from lapilli.config.reader import shown
from lapilli.errors import MediaError
from lapilli.lm import LanguageModel, build_language_model
from lapilli.modality.projector import build_projector, output_layers
from lapilli.prompt.tokenizer import Tokenizer
from lapilli.shapes import Float, Int, Tensor


@dataclass(frozen=True, slots=True)
class PreparedText:
    """The tokens of one text."""

    ids: Int[Tensor, " n"]


def last_states(
    encoder: LanguageModel, texts: Sequence[PreparedText], tokens: int
) -> Float[Tensor, "n T E"]:
    """Return the hidden states after the final norm of the last T tokens of every text.

    One pass, the texts side by side; none of them sees another.

    Args:
        encoder: a causal language model.
        texts: at least one, each of at least T tokens.
        tokens: T.
    """
    states = _states(encoder, texts)
    ends = [len(text.ids) for text in texts]
    return torch.stack([row[end - tokens : end] for row, end in zip(states, ends, strict=True)])


def mean_states(
    encoder: LanguageModel, texts: Sequence[PreparedText], tokens: int
) -> Float[Tensor, "n T E"]:
    """Return the mean hidden states of T stretches of every text, cut as evenly as can be.

    The first state is left out where there are others: in a pretrained model it is many times
    longer than those behind it, whatever its token. Arguments are those of `last_states`.
    """
    found = []
    for row, text in zip(_states(encoder, texts), texts, strict=True):
        count = len(text.ids)
        read = row[1:count] if count > tokens else row[:count]
        found.append(torch.stack([part.mean(0) for part in read.tensor_split(tokens)]))
    return torch.stack(found)


def _states(encoder: LanguageModel, texts: Sequence[PreparedText]) -> Float[Tensor, "n L E"]:
    """Return the hidden states of texts side by side, those behind a text's end being of nothing.

    Padded on the right, where no token before it looks: so no mask is needed, which is faster.
    """
    ids = nn.utils.rnn.pad_sequence([text.ids for text in texts], batch_first=True)
    assert isinstance(encoder, nn.Module)  # noqa: S101 - every language model is one
    device = next(encoder.parameters()).device
    positions = torch.arange(ids.shape[1], device=device).expand(ids.shape)
    found: Tensor = encoder(encoder.embed(ids.to(device)), position_ids=positions)
    return found


def check_utf8(text: str, name: str) -> None:
    """Refuse half a character, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise MediaError(
            f"{name}: the text has {text[error.start]!a} in it, which is no character (a lone "
            "surrogate): write the text in UTF-8"
        ) from error


class TextModality(nn.Module):
    """Texts as states of an encoder language model: the last ones, or means of stretches.

    Attributes:
        tokenizer: the language model's, given when the checkpoint is loaded; one of the encoder's
            own is not read yet.
    """

    tokenizer: Tokenizer | None

    def __init__(self, config: TextEncoderConfig, *, name: str, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        self.name = name
        self.tokenizer = None
        # Without an output layer, which nothing reads.
        self.encoder = build_language_model(replace(config.text_config, tie_embeddings=True))
        self.projector = build_projector(config.projector_for(hidden_size))

    def prepare(self, raw: object) -> PreparedText:
        """Return the tokens of a text, at most `max_length` of them.

        Raises:
            MediaError: no text, one of fewer tokens than positions or with half a character, or no
                tokenizer.
        """
        if not isinstance(raw, str) or not raw.strip():
            raise MediaError(f"{self.name}: expected a text, got {shown(raw)}")
        if self.tokenizer is None:
            raise MediaError(
                f"{self.name}: there is no tokenizer: load the checkpoint with lapilli.load, or "
                "set modality.tokenizer"
            )
        check_utf8(raw, self.name)
        # Special tokens that stand in a text are text.
        ids = self.tokenizer.encode(raw, literal=[(0, len(raw))])[: self.max_length]
        rows = self.config.text_config.vocab_size
        if max(ids, default=0) >= rows:
            raise MediaError(
                f"{self.name}: the token {max(ids)} has no row among the encoder's {rows}: the "
                "encoder was made for another tokenizer"
            )
        if len(ids) < self.config.tokens:
            raise MediaError(
                f"{self.name}: the text has {len(ids)} tokens, and the last {self.config.tokens} "
                "states are taken: give a longer text"
            )
        return PreparedText(torch.tensor(ids))

    @property
    def max_length(self) -> int:
        """Tokens that are read of a text: the setting, or what the encoder has positions for."""
        return min(self.config.max_length, self.config.text_config.max_positions)

    def num_tokens(self, prepared: PreparedText) -> int:
        """Return the number of vectors of a text."""
        return self.config.tokens

    def blank(self) -> PreparedText:
        """Return a text of the first token, for processes that train without one."""
        return PreparedText(torch.zeros(self.config.tokens, dtype=torch.long))

    def output_layers(self) -> list[nn.Linear]:
        """Return the linear layers whose outputs are the features; none without a projector."""
        return output_layers(self.projector)

    def embed(self, items: Sequence[PreparedText]) -> list[Float[Tensor, "_ D"]]:
        """Return the features of every text."""
        if not items:
            return []
        pooled = mean_states if self.config.pool == "mean" else last_states
        states = pooled(self.encoder, items, self.config.tokens)
        weight = next(self.projector.parameters(), None)
        if weight is not None:
            states = states.to(weight.device, weight.dtype)
        return list(self.projector(states))
