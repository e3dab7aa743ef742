"""Speculative decoding: draft tokens, verified by the model in one pass, as many as save time.

    answer so far ... a b c | a b c d e f (earlier text)      draft: d e f
    one pass over c d e f -> logits after each -> tokens as without a draft, until one differs

    cost      median time of the last passes of this size, or interpolated between sizes
    budget    accepts a draft token while (tokens + chance) / cost of one more > tokens / cost

A proposer knows position keys (a token id, or a number below zero in a medium) and how likely a
draft token is right; the controller knows the cost of a pass. Verification is sampling: every
token is sampled as it would be without a draft (engine/core.py).
"""

from collections import deque
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Protocol, runtime_checkable

import torch

from lapilli.errors import GenerationError
from lapilli.lm import LanguageModel
from lapilli.nn.kv_cache import KVCache

IsWorth = Callable[[float], bool]
"""Returns whether to add a draft token; given the chance that it and all before it are right."""


@runtime_checkable
class Proposer(Protocol):
    """Source of draft tokens for one sequence."""

    def propose(self, keys: Sequence[int], most: int, is_worth: IsWorth) -> list[int]:
        """Return at most `most` draft tokens, or none.

        Args:
            keys: of all positions so far; they only grow between calls.
            most: at least 1.
            is_worth: called before every draft token; False ends the draft.
        """
        ...


NewProposer = Callable[[], Proposer]
"""Factory of the proposer of a new sequence: the class PromptLookup, or a DraftModel."""

CONTEXTS = ((5, 0), (3, 0), (2, 0), (1, 0), (3, 1), (4, 2), (5, 3))
"""Contexts that are looked up: the last n tokens without the last m of them. Those with a gap find
what follows a number or a name, whichever it is."""
REACH = max(reach for reach, _ in CONTEXTS)
MOST_COUNTED = 2
STATES = (MOST_COUNTED + 1) ** 2
PRIOR_WEIGHT = 4.0
"""Number of draft tokens that the first estimate of a chance counts like."""


class Place:
    """Token that followed a context the last time, and how regularly it does."""

    __slots__ = ("misses", "run", "token")

    def __init__(self, token: int) -> None:
        self.token = token
        self.run = 0
        """Times in a row that the same token followed, at most MOST_COUNTED."""
        self.misses = 0
        """Times that another token followed; counted down after a long run."""

    @property
    def state(self) -> int:
        """Both counts as one number."""
        return self.run * (MOST_COUNTED + 1) + self.misses

    def see(self, token: int) -> None:
        """Note the token that followed this time."""
        if token != self.token:
            self.token, self.run = token, 0
            self.misses = min(self.misses + 1, MOST_COUNTED)
        elif self.run < MOST_COUNTED:
            self.run += 1
        else:
            self.misses = max(self.misses - 1, 0)


class PromptLookup:
    """Proposer that looks up the last few tokens in the text so far and takes what followed there.

    Good for answers that quote: text in a picture, keys of JSON, lists. Whether a draft token would
    have been right is learned from every token, proposed or not, so no pass of the model is spent
    to find out that a text does not repeat.

    Source: Saxena 2023, prompt lookup decoding (n-gram matching as a draft model).
    Note: there, n matching tokens are enough, and a draft has a fixed length. Here short contexts
        and contexts with a gap count too, and the hit rate of each kind in this answer decides the
        length. No context and no draft reaches into or across a medium.
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
        """Return what followed the most likely contexts, token after token."""
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
        """Return the kind of context with the highest hit rate and its token; None: no match.

        Args:
            keys: of the last positions.
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
        """Index the context of every new position, and learn the hit rates of the answer.

        Only the kind that would have been taken learns, because the best of several estimates is
        too high. Nothing is learned from the prompt, which says little about the answer.
        """
        is_answer = self._read > 0
        for at in range(self._read, len(keys)):
            token = keys[at]
            if token < 0:
                self._text = 0
                continue
            before = keys[max(0, at - REACH) : at]
            if is_answer:
                kind, proposed = self._best(before, self._text)
                if kind is not None:
                    self._learn(kind, is_right=proposed == token)
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
    """Return the first estimate of the hit rate of a kind of context."""
    reach, gap = context
    run, misses = divmod(state, MOST_COUNTED + 1)
    first = 0.3 if reach > 1 and not gap else 0.1
    return (first + run) / (1 + run + misses)


class DraftModel:
    """Draft model: a smaller language model that continues the text greedily, without the media.

    Args:
        language_model: with the vocabulary of the large one.
    """

    def __init__(self, language_model: LanguageModel) -> None:
        self.language_model = language_model

    def __call__(self) -> Proposer:
        """Return the proposer of a new sequence."""
        return DraftModelProposer(self.language_model)

    def check_vocabulary(self, wanted: int) -> None:
        """Check that the model has the same vocabulary.

        Raises:
            GenerationError: the numbers of tokens differ.
        """
        found = self.language_model.config.vocab_size
        if found != wanted:
            raise GenerationError(
                f"the draft model has {found} tokens, the model that it drafts for {wanted}: take "
                "one with the same vocabulary"
            )


AGREEMENT = 0.7
"""First estimate of how often a draft model is right."""


class DraftModelProposer:
    """Proposer with the KV cache of a draft model and its recent hit rate."""

    def __init__(self, language_model: LanguageModel) -> None:
        self._model = language_model
        self._cache: KVCache = language_model.new_cache(1)
        self._device = self._cache.device
        self._read = 0
        self._proposed: list[int] = []
        self._rate = AGREEMENT

    @torch.inference_mode()
    def propose(self, keys: Sequence[int], most: int, is_worth: IsWorth) -> list[int]:
        """Return the greedy continuation; nothing where the draft model's context ends."""
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
        """Update the hit rate with the last draft; without one it drifts back to the estimate."""
        proposed, self._proposed = self._proposed, []
        if not proposed:
            self._rate += 0.01 * (AGREEMENT - self._rate)
        for draft_token, key in zip(proposed, keys[self._read :], strict=False):
            self._rate += 0.1 * ((draft_token == key) - self._rate)
            if draft_token != key:
                return

    def _next(self, token_ids: list[int]) -> int:
        model, start = self._model, self._cache.length
        x = model.embed(torch.tensor([token_ids], device=self._device))
        positions = torch.arange(start, start + len(token_ids), device=x.device)[None]
        hidden = model.forward(x, position_ids=positions, cache=self._cache)
        return int(model.logits(hidden[0, -1]).argmax())


FIXED = 10
"""Cost of a pass that was never timed, in positions, besides its positions."""
REMEMBERED = 9
"""Passes of one size in the median, which outliers do not change."""
MEMORY = 500
"""Passes after which the times of an unused size are discarded, so that it is tried again."""


class SpeculationController:
    """Measured costs of decode passes by number of rows and draft tokens.

    Args:
        clock: seconds.
        is_timed: False uses the assumed costs only.
    """

    def __init__(self, *, clock: Callable[[], float] = perf_counter, is_timed: bool = True) -> None:
        self.clock = clock
        self._is_timed = is_timed
        self._passes = 0
        self._timed: dict[int, dict[int, _Timed]] = {}

    def budget(self, rows: int) -> "SpeculationBudget":
        """Return the budget of the next pass with this number of decoding rows.

        The first pass has no draft tokens, to compare with.
        """
        return SpeculationBudget(rows, lambda drafts: self.cost(rows, drafts))

    def cost(self, rows: int, drafts: int) -> float | None:
        """Return the seconds of a pass, or positions where passes are not timed. None: not known.

        Between two measured sizes it is interpolated, and at most the cost of any larger size.
        """
        if not self._is_timed:
            return float(FIXED + rows + drafts)
        timed = self._timed.get(rows, {})
        if 0 not in timed:
            return None
        less = max(size for size in timed if size <= drafts)
        cost = timed[less].middle
        larger = [size for size in timed if size > drafts]
        if not larger:
            return cost * (FIXED + rows + drafts) / (FIXED + rows + less)
        more = min(larger)
        cost += (timed[more].middle - cost) * (drafts - less) / (more - less)
        return min([cost, *(timed[size].middle for size in larger)])

    def learn(self, seconds: float, *, rows: int, drafts: int) -> None:
        """Record the time of a whole step with these numbers of rows and draft tokens."""
        if not self._is_timed:
            return
        self._passes += 1
        assumed = self.cost(rows, drafts)
        timed = self._timed.setdefault(rows, {})
        for size in [s for s, one in timed.items() if self._passes - one.last > MEMORY]:
            del timed[size]
        if drafts not in timed:
            # The assumed cost counts as one measurement: a first pass is often slow.
            timed[drafts] = _Timed(seconds if assumed is None else assumed)
        timed[drafts].add(seconds, now=self._passes)


class _Timed:
    """Times of the last passes of one size."""

    def __init__(self, seconds: float) -> None:
        self._seconds = deque([seconds], maxlen=REMEMBERED)
        self.middle = seconds
        self.last = 0

    def add(self, seconds: float, *, now: int) -> None:
        self._seconds.append(seconds)
        self.middle = sorted(self._seconds)[(len(self._seconds) - 1) // 2]
        self.last = now


class SpeculationBudget:
    """Draft tokens of one pass while they are collected.

    Args:
        rows: sequences, each of which gets a token in any case.
        cost: of a pass by its number of draft tokens.
    """

    def __init__(self, rows: int, cost: Callable[[int], float | None]) -> None:
        self._cost = cost
        self._tokens = float(rows)
        self._drafts = 0
        self._now = cost(0)

    def accepts(self, chance: float) -> bool:
        """Return whether one more draft token raises the tokens per second, and count it if so.

        Args:
            chance: that it and those before it in its sequence are right.
        """
        cost = self._cost(self._drafts + 1)
        if self._now is None or cost is None:
            return False
        tokens = self._tokens + chance
        if tokens * self._now <= self._tokens * cost:
            return False
        self._tokens, self._now = tokens, cost
        self._drafts += 1
        return True
