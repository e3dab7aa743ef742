"""`rank(query, items, model) -> scores`: many items after one query, whose prompt is read once.

    query, template -> Frame (prefix, suffix)      prompt.py
    item            -> its piece of the prompt     prompt.py
    pieces          -> logits of labels, a head    scorer.py, chunk by chunk
    logits          -> one number per item         score.py

The number of an item is the one that it has alone, up to the rounding of floats. Any number of
threads may use one Ranker, and several Rankers one Chat.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from lapilli.config.reader import shown
from lapilli.errors import ConfigError, PromptError
from lapilli.generate.engine.feature_cache import FeatureCache
from lapilli.pipeline import Chat, ProcessedPrompt
from lapilli.pipeline.scorer import MAX_TOKENS, PREFIX_BYTES, SuffixScorer, join
from lapilli.prompt.encode import EncodedPrompt
from lapilli.rank.prompt import (
    SETWISE,
    Content,
    Frame,
    Item,
    PromptSplitter,
    Query,
    RankTemplate,
)
from lapilli.rank.score import Head, Score, YesNo, label_tokens
from lapilli.shapes import Float, Tensor

MARKS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
"""Labels of the items of one prompt."""


class Ranker:
    """Scores items for queries with one model.

    Args:
        model: what `lapilli.load` returns.
        score: what the number of an item is.
        template: what is said of query and item; a text with {query} and {item} is its user's
            message. None: a question for yes or no.
        max_tokens: positions of items in one pass: more takes more memory.
        prefix_bytes: of keys and values that are kept of queries.

    Raises:
        PromptError: a template without a place for query or item, or a label of several tokens.
        ConfigError: limits that leave nothing, or something that is no model.
        ShapeMismatchError: a head of another model.
    """

    def __init__(
        self,
        model: Chat,
        *,
        score: Score | None = None,
        template: RankTemplate | str | None = None,
        max_tokens: int = MAX_TOKENS,
        prefix_bytes: int = PREFIX_BYTES,
    ) -> None:
        _check_model(model)
        _check_score(score)
        self._chat = model
        self._score: Score = YesNo() if score is None else score
        self._splitter = PromptSplitter(model, _template(template))
        self._scorer = SuffixScorer(model.model, max_tokens=max_tokens, prefix_bytes=prefix_bytes)
        self._lead: list[int] = []
        self._ids: list[int] = []
        if isinstance(self._score, Head):
            self._score.check(self.width)
        else:
            self._lead, self._ids = label_tokens(self._score.labels, model.tokenizer)

    @property
    def width(self) -> int:
        """Width of the vectors that an item may have: that of the language model."""
        return self._chat.model.language_model.config.hidden_size

    @property
    def prefixes(self) -> FeatureCache:
        """Keys and values of queries that were read before."""
        return self._scorer.prefixes

    def score(self, query: Query, items: Iterable[Item]) -> Float[Tensor, " n"]:
        """Return the number of every item; of no items none.

        Args:
            query: a text, messages that end with the user's, or parts. It may hold pictures.
            items: texts, vectors of the language model's width, or lists of both.

        Raises:
            PromptError: a query or an item with nothing in it.
            MediaError: vectors of another width, or of numbers that are not finite.
            ContextTooLongError: an item that does not fit.
        """
        return torch.tensor(list(self.stream(query, items)), dtype=torch.float32)

    def stream(
        self,
        query: Query,
        items: Iterable[Item],
        *,
        names: Sequence[object] | None = None,
        on_read: Callable[[int], None] | None = None,
    ) -> Iterator[float]:
        """Yield the numbers of `score` in order, as they are computed.

        Items are taken from the iterable when there is room for them, so memory is bounded however
        many there are. The query is looked at at once. `names` are what errors call the items;
        None: their numbers. `on_read` is told the positions of the query, and those of every item.
        """
        values = self._values(query, items, names, on_read)
        return (float(self._score.numbers(one[None])) for one in values)

    def label_logprobs(self, query: Query, items: Iterable[Item]) -> Float[Tensor, "n L"]:
        """Return the log-probabilities of the labels of every item, over the labels alone.

        Raises:
            ConfigError: the scores are those of a head, which has no labels.
        """
        if isinstance(self._score, Head):
            raise ConfigError("a head has no labels: take YesNo or Labels as the score")
        logits = list(self._values(query, items))
        if not logits:
            return torch.empty(0, len(self._ids))
        return torch.stack(logits).log_softmax(dim=-1)

    def _values(
        self,
        query: Query,
        items: Iterable[Item],
        names: Sequence[object] | None = None,
        on_read: Callable[[int], None] | None = None,
    ) -> Iterator[Float[Tensor, " L"]]:
        _check_items(items)
        frame = self._splitter.frame(query)
        suffixes = self._suffixes(frame, items, names)
        if on_read is not None:
            on_read(len(frame.prefix.encoded))
            suffixes = _told(suffixes, on_read)
        if isinstance(self._score, Head):
            return self._scorer.values(frame.prefix, suffixes, self._score.logits)
        return self._scorer.logits(frame.prefix, suffixes, self._ids)

    def _suffixes(
        self, frame: Frame, items: Iterable[Item], names: Sequence[object] | None
    ) -> Iterator[ProcessedPrompt]:
        """Yield everything behind the prefix, item by item."""
        closed = Frame(frame.prefix, with_lead(frame.suffix, self._lead))
        for number, item in enumerate(items):
            name = f"item {number if names is None else shown(names[number])}"
            piece = self._splitter.item(item, name)
            self._splitter.check_length(closed, piece, name)
            yield join([piece, closed.suffix])


class SetwiseRanker:
    """Compares the items of small sets, all of a set in one prompt: which of them is the best?

    An item is written behind a mark; its number is the probability of its mark over the marks
    of its set. Items of a set see those before them, so their order counts.

    Args:
        model: what `lapilli.load` returns.
        template: as that of a Ranker; the whole set stands in the place of {item}.
        marks: what the items of a set are called, each of one token.
        max_tokens: positions of sets in one pass.
        prefix_bytes: of keys and values that are kept of queries.

    Source: the setwise prompts of Zhuang et al. 2024 (arXiv 2310.09497).
    """

    def __init__(
        self,
        model: Chat,
        *,
        template: RankTemplate | str | None = None,
        marks: Sequence[str] = MARKS,
        max_tokens: int = MAX_TOKENS,
        prefix_bytes: int = PREFIX_BYTES,
    ) -> None:
        _check_model(model)
        self._marks = tuple(marks)
        self._lead, self._ids = label_tokens(self._marks, model.tokenizer)
        template = SETWISE if template is None else template
        self._splitter = PromptSplitter(model, _template(template))
        self._scorer = SuffixScorer(model.model, max_tokens=max_tokens, prefix_bytes=prefix_bytes)

    def score(self, query: Query, sets: Iterable[Sequence[Item]]) -> list[Float[Tensor, " n"]]:
        """Return per set the probabilities of its items.

        Raises:
            PromptError: a set of fewer than two items or of more than there are marks, or what
                `Ranker.score` raises.
        """
        return list(self.stream(query, sets))

    def stream(self, query: Query, sets: Iterable[Sequence[Item]]) -> Iterator[Float[Tensor, " n"]]:
        """Yield the probabilities of `score`, set by set, as they are computed."""
        _check_items(sets)
        frame = self._splitter.frame(query)
        closed = Frame(frame.prefix, with_lead(frame.suffix, self._lead))
        sizes: list[int] = []

        def suffixes() -> Iterator[ProcessedPrompt]:
            for number, items in enumerate(sets):
                name = f"set {number}"
                piece = self._splitter.item(_marked(items, self._marks, name), name)
                self._splitter.check_length(closed, piece, name)
                sizes.append(len(items))
                yield join([piece, closed.suffix])

        found = self._scorer.logits(frame.prefix, suffixes(), self._ids)
        return (logits[: sizes[at]].softmax(dim=-1) for at, logits in enumerate(found))


def rank(
    query: Query,
    items: Iterable[Item],
    model: Chat,
    *,
    score: Score | None = None,
    template: RankTemplate | str | None = None,
    max_tokens: int = MAX_TOKENS,
) -> Float[Tensor, " n"]:
    """Return one number per item, the higher the better it matches: see `Ranker.score`.

    Whoever asks again keeps a Ranker, which keeps what it read of the queries.
    """
    ranker = Ranker(model, score=score, template=template, max_tokens=max_tokens)
    return ranker.score(query, items)


def with_lead(suffix: ProcessedPrompt, lead: Sequence[int]) -> ProcessedPrompt:
    """Return the end of a prompt with tokens that all labels begin with."""
    return join([suffix, ProcessedPrompt(EncodedPrompt(list(lead), [False] * len(lead)), ())])


def _told(
    suffixes: Iterable[ProcessedPrompt], on_read: Callable[[int], None]
) -> Iterator[ProcessedPrompt]:
    """Yield the suffixes, and tell the positions of each."""
    for suffix in suffixes:
        on_read(len(suffix.encoded))
        yield suffix


def _template(given: RankTemplate | str | None) -> RankTemplate:
    if given is None:
        return RankTemplate()
    return given if isinstance(given, RankTemplate) else RankTemplate(user=given)


def _check_model(model: object) -> None:
    """Refuse what is no model.

    Raises:
        ConfigError: it is something else.
    """
    if not isinstance(model, Chat):
        raise ConfigError(f"model must be what lapilli.load returns, got {shown(model)}")


def _check_score(score: object) -> None:
    """Refuse what is no kind of score.

    Raises:
        ConfigError: it is something else.
    """
    if score is not None and not isinstance(score, Score):
        raise ConfigError(f"score must be YesNo, Labels or Head, got {shown(score)}")


def _check_items(items: object) -> None:
    """Refuse one item in the place of several.

    Raises:
        PromptError: a text, or something that is no list.
    """
    is_one = isinstance(items, str | bytes) or getattr(items, "ndim", 1) == 0
    if is_one or not isinstance(items, Iterable):
        raise PromptError(f"items must be a list of items, got {shown(items)}")


def _marked(items: Sequence[Item], marks: Sequence[str], name: str) -> list[Content]:
    """Return a set as one item: each behind its mark, on lines of their own."""
    if not isinstance(items, Sequence) or isinstance(items, str):
        raise PromptError(f"{name} must be a list of items, got {shown(items)}")
    if not 2 <= len(items) <= len(marks):
        raise PromptError(
            f"{name} has {len(items)} items: a set has 2 to {len(marks)}, one for each mark"
        )
    found: list[Content] = []
    for mark, item in zip(marks, items, strict=False):
        found.append(f"\n{mark}: " if found else f"{mark}: ")
        if isinstance(item, list | tuple):
            found += item
        else:
            found.append(item)  # type: ignore[arg-type]  # a part, or refused with its set
    return found
