"""Encoding: the last hidden states of a text as the vectors of an entry.

    texts -> ids, sorted by length -> batches, padded left -> hidden states -> the last T_s of each

Source: MixLM (arXiv 2512.07846), whose encoder is a language model without a head; an item is the
final hidden states of its last T_s tokens.
"""

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Final

import torch
from torch import nn

from lapilli.config.reader import shown
from lapilli.errors import PromptError, StoreError
from lapilli.model import VisionLanguageModel
from lapilli.prompt.encode import EncodedPrompt
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
        max_length: of the texts, where they are cut; another one makes other vectors.
    """
    module = model.language_model if isinstance(model, VisionLanguageModel) else model
    if not isinstance(module, nn.Module):
        raise StoreError(f"{type(module).__name__} has no weights to take a fingerprint of")
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        for piece in torch.split(tensor.detach().reshape(-1), _PIECE):
            digest.update(piece.cpu().contiguous().view(torch.uint8).numpy().data)
    if max_length is not None:
        digest.update(f"max_length\0{max_length}".encode())
    return f"sha256:{digest.hexdigest()}"


def encode_texts(
    model: VisionLanguageModel,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    tokens: int = 1,
    max_length: int | None = None,
    positions: int = POSITIONS,
) -> Float[Tensor, "n T D"]:
    """Return the hidden states after the final norm of the last tokens of every text, in float32.

    Special tokens that stand in a text are text. Rows of a batch do not see each other, but sums
    of another length may differ in their last bits.

    Args:
        model: whose language model reads the texts; one thread at a time may use it.
        tokenizer: of that model; it writes its own prefix, such as BOS, before each text.
        texts: any number.
        tokens: T, how many positions of each text are kept.
        max_length: tokens that are read of a text, the rest is cut off at its end; None: a text
            that the model has no positions for is refused.
        positions: of one batch, rows times the longest.

    Raises:
        PromptError: a text with fewer than T tokens, or too long a one.
    """
    if tokens < 1 or (max_length is not None and max_length < tokens):
        raise PromptError(
            f"tokens is {tokens} and max_length {max_length}: expected 1 <= tokens <= max_length"
        )
    rows = [
        _token_ids(model, tokenizer, text, number, tokens, max_length)
        for number, text in enumerate(texts)
    ]
    width = model.language_model.config.hidden_size
    found = torch.empty(len(rows), tokens, width)
    for batch in batches_by_length([len(row) for row in rows], positions):
        prompts = [EncodedPrompt(rows[number], [False] * len(rows[number])) for number in batch]
        with torch.inference_mode():
            hidden = model.forward(model.embed_prompts(prompts))
        found[batch] = hidden[:, -tokens:].to("cpu", torch.float32)
    return found


def _token_ids(
    model: VisionLanguageModel,
    tokenizer: Tokenizer,
    text: str,
    number: int,
    tokens: int,
    max_length: int | None,
) -> list[int]:
    ids = tokenizer.encode(text, literal=[(0, len(text))])[:max_length]
    limit = model.language_model.config.max_positions
    if len(ids) < tokens:
        raise PromptError(
            f"text {number} ({shown(text)}) has {len(ids)} tokens, and the states of the last "
            f"{tokens} are kept: choose fewer, or leave the text out"
        )
    if len(ids) > limit:
        raise PromptError(
            f"text {number} ({shown(text)}) has {len(ids)} tokens, and the model reads {limit}: "
            "give max_length to cut such texts"
        )
    return ids


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


def build_store(
    path: str | Path,
    items: Iterable[tuple[str, str]],
    model: VisionLanguageModel,
    tokenizer: Tokenizer,
    *,
    tokens: int = 1,
    dtype: str | None = None,
    max_length: int | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> int:
    """Encode items into a store, those that are not there yet; return how many were encoded.

    What is done is committed every half minute and when it is interrupted: run again, it goes on.

    Args:
        path: of the store; made where there is none.
        items: ids and texts.
        model: the encoder.
        tokenizer: of that model.
        tokens: see `encode_texts`.
        dtype: number format; None: that of the store, or float16.
        max_length: see `encode_texts`.
        progress: called with how many items are done.

    Raises:
        StoreError: see StoreWriter.
        PromptError: see `encode_texts`.
    """
    writer = StoreWriter(
        path,
        encoder=fingerprint(model, max_length=max_length),
        width=model.language_model.config.hidden_size,
        tokens=tokens,
        dtype=dtype,
    )
    with writer:
        committed = time.monotonic()
        done = encoded = 0
        stream = iter(items)
        try:
            while chunk := list(islice(stream, _CHUNK)):
                needed = [chunk[at] for at in writer.needed(*_columns(chunk))]
                ids, texts = _columns(needed)
                vectors = encode_texts(
                    model, tokenizer, texts, tokens=tokens, max_length=max_length
                )
                encoded += writer.add(ids, vectors, texts)
                done += len(chunk)
                progress(done)
                if time.monotonic() - committed > _COMMIT_S:
                    writer.commit()
                    committed = time.monotonic()
        except BaseException:
            if writer.is_open:  # which it is not where the disk failed
                writer.commit()
            raise
    return encoded


def _columns(items: Sequence[tuple[str, str]]) -> tuple[list[str], list[str]]:
    return [one for one, _ in items], [text for _, text in items]
