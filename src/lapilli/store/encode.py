"""Encoding: the last hidden states of a text as the vectors of an entry.

    texts -> ids, sorted by length -> batches -> hidden states -> the last T_s of each

Source: MixLM (arXiv 2512.07846), whose encoder is a language model without a head; an item is the
final hidden states of its last T_s tokens.
"""

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Final

import torch
from torch import nn

from lapilli.config.modalities import TextEncoderConfig
from lapilli.config.reader import shown
from lapilli.errors import ConfigError, MediaError, PromptError, StoreError
from lapilli.modality.text import PreparedText, TextModality, check_utf8, last_states
from lapilli.model import VisionLanguageModel
from lapilli.prompt.tokenizer import Tokenizer
from lapilli.shapes import Float, Tensor
from lapilli.store.writer import StoreWriter

POSITIONS: Final = 8192
"""Positions of a batch, padding included."""

_CHUNK: Final = 256  # texts that are sorted by length together
_COMMIT_S: Final = 30.0  # what a kill may cost
_PIECE: Final = 1 << 24  # numbers that are hashed at once


def fingerprint(model: nn.Module, *, max_length: int | None = None) -> str:
    """Return what tells an encoder from every other one: "sha256:" and a digest.

    It is over names, shapes, number formats and bytes of the weights of the language model, or of
    any other module, in the order of the names. The same checkpoint in another number format, as
    another device may choose, is another encoder.

    Args:
        model: a VisionLanguageModel, or a module as a whole.
        max_length: of the texts, where they are cut; another one makes other vectors. A modality
            of texts has its own.
    """
    module = model.language_model if isinstance(model, VisionLanguageModel) else model
    if isinstance(module, TextModality):
        max_length = module.max_length
    if not isinstance(module, nn.Module):
        raise StoreError(f"{type(module).__name__} has no weights to take a fingerprint of")
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        for piece in torch.split(tensor.detach().reshape(-1), _PIECE):
            digest.update(piece.cpu().contiguous().view(torch.uint8).numpy().data)
    if max_length is not None:
        digest.update(f"max_length\0{max_length}".encode())
    if isinstance(module, TextModality) and module.config.pool != "last":
        digest.update(f"pool\0{module.config.pool}".encode())
    return f"sha256:{digest.hexdigest()}"


class TextEncoder:
    """What makes vectors of texts: a language model, or a modality of kind `text` of a checkpoint.

    A language model gives the hidden states after its final norm of a text's last tokens, a
    modality what stands in the prompt for the text: such states behind its projector. Special
    tokens that stand in a text are text.

    Args:
        model: whose language model or modality reads the texts; one thread at a time may use it.
        tokenizer: of that model; it writes its own prefix, such as BOS, before each text.
        tokens: T, how many positions of each text are kept; None: what the modality says, or 1.
        max_length: tokens that are read of a text, the rest is cut off at its end; None: what the
            modality says; a text that a language model has no positions for is refused.
        modality: name of the modality; None: the language model itself.

    Raises:
        ConfigError: a name of no such modality, or sizes that contradict it.
        PromptError: sizes that contradict each other.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        tokenizer: Tokenizer,
        *,
        tokens: int | None = None,
        max_length: int | None = None,
        modality: str | None = None,
    ) -> None:
        if not isinstance(model, VisionLanguageModel):
            raise ConfigError(
                f"model is a {type(model).__name__}: expected a VisionLanguageModel, such as "
                "lapilli.load(...).model"
            )
        self._model, self._tokenizer, self._max_length = model, tokenizer, max_length
        self.width: int = model.language_model.config.hidden_size
        self.tokens = 1 if tokens is None else tokens
        self._modality: TextModality | None = None
        if modality is not None:
            self._modality = _text_modality(model, modality, tokens, max_length)
            self.tokens = self._modality.config.tokens
        if self.tokens < 1 or (max_length is not None and max_length < self.tokens):
            raise PromptError(
                f"tokens is {tokens} and max_length {max_length}: expected 1 <= tokens <= "
                "max_length"
            )

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self._model.device

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the weights that read the texts; see `fingerprint`."""
        if self._modality is not None:
            return fingerprint(self._modality)
        return fingerprint(self._model, max_length=self._max_length)

    def encode(
        self,
        texts: Sequence[str],
        *,
        names: Sequence[str] | None = None,
        positions: int = POSITIONS,
    ) -> Float[Tensor, "n T D"]:
        """Return the vectors of every text, in float32.

        Rows of a batch do not see each other, but sums of another length may differ in their last
        bits.

        Args:
            texts: any number.
            names: what errors call the texts; None: by their numbers.
            positions: of one batch, rows times the longest.

        Raises:
            PromptError: no text, one with fewer than T tokens, or too long a one.
            MediaError: half a character in a text.
        """
        if isinstance(texts, str) or not isinstance(texts, Sequence):
            raise PromptError(f"texts are {shown(texts)}: expected a list of texts")
        names = [f"text {number}" for number in range(len(texts))] if names is None else names
        rows = [self._prepared(*pair) for pair in zip(texts, names, strict=True)]
        found = torch.empty(len(rows), self.tokens, self.width)
        for batch in batches_by_length([len(row.ids) for row in rows], positions):
            chosen = [rows[number] for number in batch]
            with torch.inference_mode():
                vectors = self._vectors(chosen)
            found[batch] = vectors.to("cpu", torch.float32)
        return found

    def _vectors(self, rows: Sequence[PreparedText]) -> Float[Tensor, "n T D"]:
        if self._modality is not None:
            return torch.stack(self._modality.embed(rows))
        return last_states(self._model.language_model, rows, self.tokens)

    def _prepared(self, text: str, name: str) -> PreparedText:
        if not isinstance(text, str) or not text.strip():
            raise PromptError(f"{name} is {shown(text)}: expected a text")
        check_utf8(text, name)
        if self._modality is None:
            return self._token_ids(text, name)
        try:
            return self._modality.prepare(text)
        except MediaError as error:
            raise PromptError(f"{name} ({shown(text)}): {error}") from error

    def _token_ids(self, text: str, name: str) -> PreparedText:
        ids = self._tokenizer.encode(text, literal=[(0, len(text))])[: self._max_length]
        limit = self._model.language_model.config.max_positions
        if len(ids) < self.tokens:
            raise PromptError(
                f"{name} ({shown(text)}) has {len(ids)} tokens, and the states of the last "
                f"{self.tokens} are kept: choose fewer, or leave the text out"
            )
        if len(ids) > limit:
            raise PromptError(
                f"{name} ({shown(text)}) has {len(ids)} tokens, and the model reads {limit}: "
                "give max_length to cut such texts"
            )
        return PreparedText(torch.tensor(ids))


def _text_modality(
    model: VisionLanguageModel, name: str, tokens: int | None, max_length: int | None
) -> TextModality:
    """Return the modality of this name, which has sizes of its own."""
    found = model.modality(name)
    if not isinstance(found, TextModality):
        raise ConfigError(
            f"modality {name!r} reads no texts: expected one of kind {TextEncoderConfig.kind!r}"
        )
    config = found.config
    for key, given, own in (
        ("tokens", tokens, config.tokens),
        ("max_length", max_length, config.max_length),
    ):
        if given not in (None, own):
            raise ConfigError(
                f"{key} is {given}, and modality {name!r} has {own}: leave it out, as the vectors "
                "are to be those of its prompts"
            )
    return found


def encode_texts(
    model: VisionLanguageModel,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    tokens: int | None = None,
    max_length: int | None = None,
    modality: str | None = None,
) -> Float[Tensor, "n T D"]:
    """Return the vectors of every text, in float32: see TextEncoder, which encodes many."""
    encoder = TextEncoder(model, tokenizer, tokens=tokens, max_length=max_length, modality=modality)
    return encoder.encode(texts)


def batches_by_length(lengths: Sequence[int], positions: int) -> Iterator[list[int]]:
    """Yield numbers of rows that go through a model together, the longest first.

    A batch has at most `positions` positions with its padding, or one row.
    """
    order = sorted(range(len(lengths)), key=lambda number: -lengths[number])
    start = 0
    while start < len(order):
        count = max(1, positions // max(1, lengths[order[start]]))
        yield order[start : start + count]
        start += count


@dataclass(frozen=True, slots=True)
class Encoded:
    """Items whose vectors are ready to be written.

    Attributes:
        ids: of the items.
        texts: that they were made of.
        vectors: float32 [n, T, D].
        done: how many items of the whole are done with them, unchanged ones included.
    """

    ids: list[str | int]
    texts: list[str]
    vectors: Float[Tensor, "n T D"]
    done: int


def build_store(
    path: str | Path,
    items: Iterable[tuple[str | int, str]],
    encoder: TextEncoder,
    *,
    dtype: str | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> int:
    """Encode items into a store, those that are not there yet; return how many were encoded.

    What is done is committed every half minute and when it is interrupted: run again, it goes on.

    Args:
        path: of the store; made where there is none.
        items: ids and texts.
        encoder: what reads the texts.
        dtype: number format; None: that of the store, or float16.
        progress: called with how many items are done.

    Raises:
        StoreError: see StoreWriter.
        PromptError: see `TextEncoder.encode`.
    """

    def encoded(writer: StoreWriter) -> Iterator[Encoded]:
        for ids, texts, done in needed_items(writer, items):
            vectors = encoder.encode(texts, names=[f"item {shown(one)}" for one in ids])
            yield Encoded(ids, texts, vectors, done)

    return fill(path, encoder, encoded, dtype=dtype, progress=progress)


def fill(
    path: str | Path,
    encoder: TextEncoder,
    encoded: Callable[[StoreWriter], Iterable[Encoded]],
    *,
    dtype: str | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> int:
    """Write what is encoded into a store; return how many entries are new or changed.

    Args:
        path: of the store; made where there is none.
        encoder: whose fingerprint and sizes the entries have.
        encoded: makes the items, given the writer, which knows what is there.
        dtype: see `build_store`.
        progress: likewise.

    Raises:
        StoreError: see StoreWriter.
    """
    writer = StoreWriter(
        path,
        encoder=encoder.fingerprint,
        width=encoder.width,
        tokens=encoder.tokens,
        dtype=dtype,
    )
    with writer:
        committed = time.monotonic()
        changed = 0
        try:
            for batch in encoded(writer):
                changed += writer.add(batch.ids, batch.vectors, batch.texts)
                progress(batch.done)
                if time.monotonic() - committed > _COMMIT_S:
                    writer.commit()
                    committed = time.monotonic()
        except BaseException:
            if writer.is_open:  # which it is not where the disk failed
                writer.commit()
            raise
    return changed


def needed_items(
    writer: StoreWriter, items: Iterable[tuple[str | int, str]], *, chunk_size: int | None = None
) -> Iterator[tuple[list[str | int], list[str], int]]:
    """Yield ids and texts that have to be encoded, chunk by chunk, and how many items came so far.

    A chunk is what is left of `chunk_size` items, and may be empty.
    """
    stream, done = iter(items), 0
    while chunk := list(islice(stream, chunk_size or _CHUNK)):
        needed = [chunk[at] for at in writer.needed(*_columns(chunk))]
        done += len(chunk)
        yield *_columns(needed), done


def _columns(items: Sequence[tuple[str | int, str]]) -> tuple[list[str | int], list[str]]:
    return [one for one, _ in items], [text for _, text in items]
