"""Guesses of the next tokens, checked by the model in one pass: same answers, fewer passes.

    answer so far ... a b c | a b c d e f (earlier text)      guess: d e f
    one pass over c d e f -> logits after each -> tokens as without guesses, until one differs

Position keys: a token id, or a number below zero under a medium. Knows keys and how likely a guess
is right; must not know what a token means or what a pass costs (payoff.py). Checking is the
engine's, which draws every token as it would have without a guess.
"""

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import torch

from lapilli.errors import GenerationError
from lapilli.lm.base import LanguageModel
from lapilli.nn.kv_cache import KVCache

IsWorth = Callable[[float], bool]
"""Whether one more guess may be made that is right, with all before it, with this probability."""


@runtime_checkable
class Drafting(Protocol):
    """The guesses about one sequence."""

    def propose(self, keys: Sequence[int], most: int, is_worth: IsWorth) -> list[int]:
        """At most `most` token ids that may follow; none when nothing suggests itself.

        Args:
            keys: of all positions so far. From call to call they only grow.
            most: at least 1.
            is_worth: asked before every guess; after a no there is no further one.
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

    Source: Saxena 2023, prompt lookup decoding (n-gram matching as a draft model).
    Note: there, n words in a row that were seen before are enough, for a guess of fixed length.
        Here few words and words with a gap count too, and how often such a place was right in this
        answer says how far a guess goes. Neither what is looked up nor what is proposed reaches
        into or across a medium.
    """

    def begin(self) -> Drafting:
        """For a new sequence."""
        return LookupDrafting()


CONTEXTS = ((5, 0), (3, 0), (2, 0), (1, 0), (3, 1), (4, 2), (5, 3))
"""What is looked up: so many tokens from the end of the text, without so many of the last. Those
with a gap know what follows a number or a name, whatever it is."""
REACH = max(reach for reach, _ in CONTEXTS)
MOST_COUNTED = 2
STATES = (MOST_COUNTED + 1) ** 2
PRIOR_WEIGHT = 4.0
"""A first estimate counts like so many guesses."""


class Place:
    """What followed one context the last time, and whether that was what followed before."""

    __slots__ = ("misses", "run", "token")

    def __init__(self, token: int) -> None:
        self.token = token
        self.run = 0
        """Times in a row that the same followed again, as far as they are counted."""
        self.misses = 0
        """Times that something else followed; forgiven one by one after a long run."""

    @property
    def state(self) -> int:
        """One number for both counts."""
        return self.run * (MOST_COUNTED + 1) + self.misses

    def see(self, token: int) -> None:
        """What followed this time."""
        if token != self.token:
            self.token, self.run = token, 0
            self.misses = min(self.misses + 1, MOST_COUNTED)
        elif self.run < MOST_COUNTED:
            self.run += 1
        else:
            self.misses = max(self.misses - 1, 0)


class LookupDrafting:
    """Every context of one sequence, and how often guesses from its kind of places were right.

    Whether a guess would have been right is known for every token, made or not: so it costs no
    pass of the model to find out that a text does not repeat.
    """

    def __init__(self) -> None:
        self._places: list[dict[tuple[int, ...], Place]] = [{} for _ in CONTEXTS]
        self._chances = [
            _first_chance(context, state) for context in CONTEXTS for state in range(STATES)
        ]
        self._counts = [PRIOR_WEIGHT] * len(self._chances)
        self._read = 0
        self._text = 0
        """Tokens since the last medium."""

    def propose(self, keys: Sequence[int], most: int, is_worth: IsWorth) -> list[int]:
        """What followed the most promising places, guess after guess."""
        self._index(keys)
        end = list(keys[len(keys) - min(self._text, REACH) :])
        proposed: list[int] = []
        chance = 1.0
        while len(proposed) < most:
            kind, token = self._best(end, len(end))
            if kind is None:
                break
            chance *= self._chances[kind]
            if not is_worth(chance):
                break
            proposed.append(token)
            end.append(token)
        return proposed

    def _best(self, keys: Sequence[int], text: int) -> tuple[int | None, int]:
        """The kind of place that was right most often, and the token there; None: no place.

        Args:
            keys: end with what is looked up.
            text: of them, tokens since the last medium.
        """
        end = len(keys)
        best, token, best_chance = None, -1, 0.0
        for number, (reach, gap) in enumerate(CONTEXTS):
            if reach > text:
                continue
            place = self._places[number].get(tuple(keys[end - reach : end - gap]))
            if place is None:
                continue
            kind = number * STATES + place.state
            if self._chances[kind] > best_chance:
                best, token, best_chance = kind, place.token, self._chances[kind]
        return best, token

    def _index(self, keys: Sequence[int]) -> None:
        """Note what stands before each position that has been added.

        Only kinds that would have been taken learn from it: the best of several looks better than
        it is, and this is how that is put right. What was asked says little about the answer, so
        nothing is learned from the tokens that are there when the answer begins.
        """
        is_answer = self._read > 0
        for at in range(self._read, len(keys)):
            token = keys[at]
            if token < 0:
                self._text = 0
                continue
            before = keys[max(0, at - REACH) : at]
            if is_answer:
                kind, guess = self._best(before, self._text)
                if kind is not None:
                    self._learn(kind, is_right=guess == token)
            self._note(before, token)
            self._text += 1
        self._read = len(keys)

    def _note(self, before: Sequence[int], token: int) -> None:
        end = len(before)
        for (reach, gap), places in zip(CONTEXTS, self._places, strict=True):
            if reach > self._text:
                continue
            context = tuple(before[end - reach : end - gap])
            place = places.get(context)
            if place is None:
                places[context] = Place(token)
            else:
                place.see(token)

    def _learn(self, kind: int, *, is_right: bool) -> None:
        self._counts[kind] += 1
        self._chances[kind] += (is_right - self._chances[kind]) / self._counts[kind]


def _first_chance(context: tuple[int, int], state: int) -> float:
    """What is thought of a kind of place before it was seen in an answer."""
    reach, gap = context
    run, misses = divmod(state, MOST_COUNTED + 1)
    first = 0.3 if reach > 1 and not gap else 0.1
    return (first + run) / (1 + run + misses)


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


AGREEMENT = 0.7
"""What is thought of a small model before it was heard: how often it says the same."""


class ModelDrafting:
    """A small model that reads along, and how often it was right of late."""

    def __init__(self, language_model: LanguageModel) -> None:
        self._model = language_model
        self._cache: KVCache = language_model.new_cache(1)
        self._device = self._cache.device
        self._read = 0
        self._proposed: list[int] = []
        self._rate = AGREEMENT

    @torch.inference_mode()
    def propose(self, keys: Sequence[int], most: int, is_worth: IsWorth) -> list[int]:
        """The greedy continuation; nothing where the small model's context ends."""
        self._learn(keys)
        new = [key for key in keys[self._read :] if key >= 0]
        if self._cache.length + len(new) + most > self._model.config.max_positions or not new:
            return []
        proposed: list[int] = []
        chance = self._rate
        kept = self._cache.length
        while len(proposed) < most and is_worth(chance):
            proposed.append(self._next(proposed[-1:] or new))
            chance *= self._rate
        if proposed:
            self._cache.truncate(kept + len(new))
            self._read = len(keys)
        self._proposed = proposed
        return proposed

    def _learn(self, keys: Sequence[int]) -> None:
        """Compare the last guesses with what came; forget slowly where nothing was guessed."""
        proposed, self._proposed = self._proposed, []
        if not proposed:
            self._rate += 0.01 * (AGREEMENT - self._rate)
        for guess, key in zip(proposed, keys[self._read :], strict=False):
            self._rate += 0.1 * ((guess == key) - self._rate)
            if guess != key:
                return

    def _next(self, token_ids: list[int]) -> int:
        model, start = self._model, self._cache.length
        x = model.embed(torch.tensor([token_ids], device=self._device))
        positions = torch.arange(start, start + len(token_ids), device=x.device)[None]
        hidden = model.forward(x, position_ids=positions, cache=self._cache)
        return int(model.logits(hidden[0, -1]).argmax())
