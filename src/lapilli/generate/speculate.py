"""Guesses of the next tokens, checked by the model in one pass: same answers, fewer passes.

    answer so far ... a b c | a b c d e f (earlier text)      guess: d e f
    one pass over c d e f -> logits after each -> tokens as without guesses, until one differs

Position keys: a token id, or a number below zero under a medium. Knows keys; must not know what a
token means. Checking is the engine's, which draws every token as it would have without a guess.
"""

from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Protocol, runtime_checkable

import torch

from lapilli.errors import GenerationError
from lapilli.lm.base import LanguageModel
from lapilli.nn.kv_cache import KVCache

MOST_GUESSING = 64
"""Guessing passes after which a plain one is timed again."""


@runtime_checkable
class Drafting(Protocol):
    """The guesses about one sequence."""

    def propose(self, keys: Sequence[int], most: int) -> list[int]:
        """At most `most` token ids that may follow; none when nothing suggests itself.

        Args:
            keys: of all positions so far. From call to call they only grow.
            most: at least 1.
        """
        ...


@runtime_checkable
class Drafter(Protocol):
    """Where guesses come from."""

    def begin(self) -> Drafting:
        """For a new sequence."""
        ...


class PromptLookup:
    """Guesses that what followed the same few words before follows again.

    Good for answers that quote: text read off a picture, JSON with its keys, lists.

    Args:
        longest: tokens that are looked up, if so many in a row were seen before.
        shortest: fewest that are enough.

    Source: Saxena 2023, prompt lookup decoding (n-gram matching as a draft model).
    Note: neither what is looked up nor what is proposed reaches into or across a medium.
    """

    def __init__(self, *, longest: int = 4, shortest: int = 2) -> None:
        if not 1 <= shortest <= longest:
            raise GenerationError(
                f"prompt lookup needs 1 <= shortest <= longest, got {shortest} and {longest}"
            )
        self._lengths = range(longest, shortest - 1, -1)

    def begin(self) -> Drafting:
        """For a new sequence."""
        return LookupDrafting(self._lengths)


class LookupDrafting:
    """Where every few words of one sequence were followed by something, the latest place counts."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self._lengths = lengths
        self._after: dict[tuple[int, ...], int] = {}
        self._indexed = 0

    def propose(self, keys: Sequence[int], most: int) -> list[int]:
        """What followed the longest known end of the sequence."""
        self._index(keys)
        for length in self._lengths:
            at = self._after.get(tuple(keys[-length:]))
            if at is not None:
                return _text(keys[at : at + most])
        return []

    def _index(self, keys: Sequence[int]) -> None:
        """Note what comes before each position that has been added."""
        for at in range(self._indexed, len(keys)):
            for length in self._lengths:
                words = tuple(keys[max(0, at - length) : at])
                if len(words) == length and min(words) >= 0:
                    self._after[words] = at
        self._indexed = len(keys)


def _text(keys: Sequence[int]) -> list[int]:
    """The ids before the first medium."""
    end = next((i for i, key in enumerate(keys) if key < 0), len(keys))
    return list(keys[:end])


class DraftModel:
    """Guesses what a smaller language model would say about the text alone, greedily.

    Args:
        language_model: with the vocabulary of the large one.
    """

    def __init__(self, language_model: LanguageModel) -> None:
        self.language_model = language_model

    def begin(self) -> Drafting:
        """For a new sequence."""
        return ModelDrafting(self.language_model)

    def check_vocabulary(self, wanted: int) -> None:
        """Refuse to guess for a model with another vocabulary.

        Raises:
            GenerationError: the numbers of tokens differ.
        """
        found = self.language_model.config.vocab_size
        if found != wanted:
            raise GenerationError(
                f"the draft model has {found} tokens, the model that it guesses for {wanted}: take "
                "one with the same vocabulary"
            )


class ModelDrafting:
    """A small model that reads along."""

    def __init__(self, language_model: LanguageModel) -> None:
        self._model = language_model
        self._cache: KVCache = language_model.new_cache(1)
        self._device = self._cache.device
        self._read = 0

    @torch.inference_mode()
    def propose(self, keys: Sequence[int], most: int) -> list[int]:
        """The greedy continuation; nothing where the small model's context ends."""
        new = [key for key in keys[self._read :] if key >= 0]
        self._read = len(keys)
        if self._cache.length + len(new) + most > self._model.config.max_positions or not new:
            return []
        token = self._next(new)
        kept = self._cache.length
        proposed = [token]
        while len(proposed) < most:
            proposed.append(self._next(proposed[-1:]))
        self._cache.truncate(kept)
        return proposed

    def _next(self, token_ids: list[int]) -> int:
        model, start = self._model, self._cache.length
        x = model.embed(torch.tensor([token_ids], device=self._device))
        positions = torch.arange(start, start + len(token_ids), device=x.device)[None]
        hidden = model.forward(x, position_ids=positions, cache=self._cache)
        return int(model.logits(hidden[0, -1]).argmax())


class Pace:
    """How many tokens to guess for one sequence: more after guesses that were right."""

    def __init__(self, *, first: int = 4, most: int = 16) -> None:
        self.length = first
        self._most = most

    def learn(self, proposed: int, accepted: int) -> None:
        """What became of a guess."""
        self.length = (
            min(2 * self.length, self._most) if accepted == proposed else max(1, accepted + 1)
        )


class Payoff:
    """Whether guessing makes tokens come faster, by the clock.

    A pass that checks guesses takes longer than a plain one of as many rows. Guessing goes on while
    it gives more tokens a second than plain passes of late; otherwise it rests, longer every time,
    and is tried again.

    Args:
        clock: seconds.
        patience: guessing passes that are watched before it may be stopped.
    """

    def __init__(self, *, clock: Callable[[], float] = perf_counter, patience: int = 4) -> None:
        self.clock = clock
        self._patience = patience
        self._plain: dict[int, float] = {}
        self._gain = 1.0
        self._watched = 0
        self._rest = 0
        self._next_rest = 16
        self._guessed_on = 0

    @property
    def gain(self) -> float:
        """Tokens a second with guesses over those without, lately."""
        return self._gain

    def wants_guesses(self, rows: int) -> bool:
        """Whether to guess in the next pass of so many rows.

        A plain pass comes first, and again after many guessing ones, to compare with.
        """
        return self._rest == 0 and rows in self._plain and self._guessed_on < MOST_GUESSING

    def learn(self, seconds: float, *, rows: int, tokens: int, guessed: bool) -> None:
        """What a pass over growing rows took and gave.

        Args:
            seconds: of the pass.
            rows: sequences that grew.
            tokens: that they gained together.
            guessed: whether guesses were checked in it.
        """
        if not guessed:
            self._rest = max(0, self._rest - 1)
            self._guessed_on = 0
            old = self._plain.get(rows, seconds)
            self._plain[rows] = old + 0.2 * (seconds - old)
            return
        self._guessed_on += 1
        plain = self._plain.get(rows)
        if plain is None:
            return  # guesses are on whatever they cost
        self._gain += 0.2 * (tokens * plain / (rows * max(seconds, 1e-9)) - self._gain)
        self._watched += 1
        if self._watched < self._patience:
            return
        if self._gain < 1:
            self._rest, self._next_rest = self._next_rest, min(2 * self._next_rest, 1024)
            self._watched, self._gain = 0, 1.0
        else:
            self._next_rest = 16
