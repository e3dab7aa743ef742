"""Embeddings of texts and pictures: one vector each, from the language model's last states.

    text, [picture, text]   as they are, behind the first token     messages   in their template
      -> last hidden states behind the final norm [T, D]
      -> mean over the positions of text, those of media where there is none
      -> length 1, float32 [D]

Every vector is that of its input alone, up to the rounding of floats. Knows prompts; must not know
what the vectors are for.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from lapilli.config.reader import shown
from lapilli.errors import ContextTooLongError, PromptError
from lapilli.generate.reference import lock_of
from lapilli.pipeline.backend import ProcessedPrompt
from lapilli.pipeline.chat import Chat
from lapilli.prompt.encode import encode
from lapilli.prompt.guard import check_work
from lapilli.prompt.message import MediaPart, Message, TextPart
from lapilli.prompt.template import MediaSlot, Segment, TextSegment
from lapilli.shapes import Float, Tensor

MAX_TOKENS = 2048


class Embedder:
    """Makes vectors of texts and pictures with one model, for any number of threads.

    Args:
        chat: what `lapilli.load` returns.
        max_tokens: positions in one pass, padding included.
    """

    def __init__(self, chat: Chat, *, max_tokens: int = MAX_TOKENS) -> None:
        self._chat = chat
        self._max_tokens = max_tokens

    def embed(self, inputs: Sequence[object]) -> Float[Tensor, "n D"]:
        """Return a vector for each input; see `Chat.embed`."""
        if isinstance(inputs, str) or not isinstance(inputs, Sequence):
            raise PromptError(f"inputs must be a list, one for each vector, got {shown(inputs)}")
        return self.vectors([self.prompt(one, f"input {at}") for at, one in enumerate(inputs)])

    def prompt(self, given: object, name: str) -> ProcessedPrompt:
        """Return an input as the model reads it; `name` is what errors call it.

        Raises:
            PromptError: nothing in it.
            MediaError: a picture cannot be fetched or decoded.
            ContextTooLongError: more than the model reads.
        """
        parts: list[Any] = list(given) if isinstance(given, list | tuple) else [given]
        if parts and all(type(one) is int for one in parts):
            raise PromptError(f"{name} is a list of numbers: give texts, pictures or messages")
        if any(isinstance(one, Message) for one in parts):
            found = self._chat.encode(parts)
        else:
            found = self._content(parts, name)
        length, limit = len(found.encoded), self._chat.context_length
        if length > limit:
            raise ContextTooLongError(
                f"{name} has {length} positions, but the model reads {limit}: shorten it"
            )
        return found

    def vectors(self, prompts: Sequence[ProcessedPrompt]) -> Float[Tensor, "n D"]:
        """Return a vector for each prompt, float32 on the CPU."""
        width = self._chat.model.language_model.config.hidden_size
        found = torch.empty(len(prompts), width)
        for rows in self._chunks(prompts):
            check_work()
            found[rows] = self._pass([prompts[row] for row in rows])
        return found

    def _chunks(self, prompts: Sequence[ProcessedPrompt]) -> Iterator[list[int]]:
        """Yield rows that go through the model together, of about one length."""
        chunk: list[int] = []
        for row in sorted(range(len(prompts)), key=lambda at: len(prompts[at].encoded)):
            if chunk and (len(chunk) + 1) * len(prompts[row].encoded) > self._max_tokens:
                yield chunk
                chunk = []
            chunk.append(row)
        if chunk:
            yield chunk

    @torch.inference_mode()
    def _pass(self, prompts: Sequence[ProcessedPrompt]) -> Float[Tensor, "n D"]:
        model = self._chat.model
        with lock_of(model.language_model).turn:
            batch = model.embed_prompts(
                [one.encoded for one in prompts], [one.media for one in prompts]
            )
            hidden = model(batch).float().cpu()  # rows end together
        longest = hidden.shape[1]
        means = []
        for row, one in enumerate(prompts):
            start = longest - len(one.encoded)
            places = [start + at for at in self._places(one)]
            means.append(hidden[row, places].mean(dim=0))
        return torch.nn.functional.normalize(torch.stack(means), dim=-1)

    def _places(self, prompt: ProcessedPrompt) -> list[int]:
        """Return the positions that are averaged."""
        covered = {i for s in prompt.encoded.spans for i in range(s.start, s.start + s.length)}
        first = len(self._chat.tokenizer.prefix_ids)
        text = [at for at in range(first, len(prompt.encoded)) if at not in covered]
        return text or sorted(covered)

    def _content(self, parts: Sequence[object], name: str) -> ProcessedPrompt:
        segments: list[Segment] = []
        media: list[Any] = []
        for part in parts:
            text = part.text if isinstance(part, TextPart) else part
            if isinstance(text, str):
                segments += [TextSegment(text, literal=True)] if text else []
                continue
            source = str(part) if isinstance(part, Path) else part
            medium = source if isinstance(source, MediaPart) else MediaPart(source)
            segments.append(MediaSlot(medium.modality))
            media.append(self._chat.prepare(medium))
        if not media and not any(isinstance(s, TextSegment) and s.text.strip() for s in segments):
            raise PromptError(f"{name} is empty: give it a text or a picture")
        slots = [one for one in segments if isinstance(one, MediaSlot)]
        lengths = [
            self._chat.model.span_length(slot.modality, one)
            for slot, one in zip(slots, media, strict=True)
        ]
        image_id = self._chat.config.tokens.image_id
        encoded = encode(segments, self._chat.tokenizer, lengths, image_id=image_id)
        return ProcessedPrompt(encoded, tuple(media))
