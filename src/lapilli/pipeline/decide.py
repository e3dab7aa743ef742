r"""Decisions: many questions about one input, which is read once, answered by probabilities.

    input      [system] "USER: " [picture] text       read once: SuffixScorer's prefix
    questions  "\nIs it red? Answer yes or no. ASSISTANT:"      packed behind it, one pass
    labels     yes no | A B C | 01 02 ...             labels.py: logits -> probabilities

Labels of several tokens are read behind their question, which the scorer has once for all of them.

The conversation is rendered by the model's own template and cut where a question begins, so that a
question about a picture has the tokens that it has when it is asked. Every answer is the one that
the question has alone, up to the rounding of floats. Knows questions and prompts; must not know how
a pass is made.
"""

import pathlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from lapilli.config.reader import shown
from lapilli.errors import ContextTooLongError, PromptError
from lapilli.pipeline.backend import ProcessedPrompt
from lapilli.pipeline.chat import Chat
from lapilli.pipeline.labels import LabelTree, Path, spellings
from lapilli.pipeline.marks import Marks
from lapilli.pipeline.questions import (
    Answer,
    Choice,
    ChoiceAnswer,
    Decisions,
    Predicate,
    PredicateAnswer,
    Question,
    Refusal,
    ScoreAnswer,
)
from lapilli.pipeline.scorer import PREFIX_BYTES, SuffixScorer, join
from lapilli.pipeline.wording import Wording, codes_of, part_of, question_parts
from lapilli.prompt.encode import EncodedPrompt, encode
from lapilli.prompt.message import MediaPart, Message, TextPart, check_conversation
from lapilli.prompt.template import MediaSlot, Segment, TextSegment
from lapilli.shapes import Float, Tensor

YES = ("yes", "Yes", " yes", " Yes")
NO = ("no", "No", " no", " No")
_LONGEST_PATH = 1024  # letters


@dataclass(frozen=True, slots=True)
class _Frame:
    """A conversation that is cut where the question goes.

    Attributes:
        prefix: what all questions share.
        opening: white space before the question, which is read with it.
        closing: what the template writes behind the question.
        media: of the closing.
    """

    prefix: ProcessedPrompt
    opening: tuple[Segment, ...]
    closing: tuple[Segment, ...]
    media: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class _Asked:
    """A question as it goes into the model: its piece of the prompt, up to where labels part."""

    question: Question
    tree: LabelTree
    piece: ProcessedPrompt

    @property
    def suffixes(self) -> dict[Path, ProcessedPrompt]:
        """Return what stands behind the prefix, per node of the labels."""
        skip = len(self.tree.lead)
        return {path: join([self.piece, _tokens(path[skip:])]) for path in self.tree.nodes}


class Decider:
    """Answers questions with one model, for any number of threads.

    Args:
        chat: what `lapilli.load` returns.
        without_media: the fixed sentence of a checkpoint that answers nothing without a picture;
            "": it answers.
        prefix_bytes: of keys and values that are kept of inputs.
    """

    def __init__(
        self, chat: Chat, without_media: str = "", *, prefix_bytes: int = PREFIX_BYTES
    ) -> None:
        self._chat = chat
        self._without_media = without_media
        self._scorer = SuffixScorer(chat.model, prefix_bytes=prefix_bytes)

    def decide(
        self, given: object, questions: Sequence[Question], wording: Wording | None = None
    ) -> Decisions:
        """Return the answers to all questions about one input; see `Chat.decide`."""
        _check_questions(questions)
        wording = Wording() if wording is None else wording
        frame = self._frame(_conversation(given))
        asked = [
            self._ask(frame, question, wording, f"question {number}")
            for number, question in enumerate(questions)
        ]
        prefix = frame.prefix
        kept: list[bool] = []
        logits = self._read(prefix, [one for one in asked if self._is_answered(one, prefix)], kept)
        answers: list[Answer] = []
        for one in asked:
            if not self._is_answered(one, prefix):
                answers.append(Refusal(self._without_media + _hint(given), one.question.name))
                continue
            answers.append(_answer(one.question, one.tree.probabilities(next(logits))))
        shared = len(prefix.encoded)
        read = shared + sum(len(one.piece.encoded) for one in asked)
        return Decisions(tuple(answers), read, shared if any(kept) else 0, shared)

    def _is_answered(self, asked: _Asked, prefix: ProcessedPrompt) -> bool:
        """Return whether the checkpoint has more to say than its sentence for no picture."""
        return not self._without_media or bool(asked.piece.encoded.spans or prefix.encoded.spans)

    def _read(
        self, prefix: ProcessedPrompt, asked: Sequence[_Asked], kept: list[bool]
    ) -> Iterator[dict[Path, Float[Tensor, " k"]]]:
        """Yield the logits of every node of every question, all packed behind the prefix."""
        ids = sorted({i for one in asked for some in one.tree.nodes.values() for i in some})
        column = {token: at for at, token in enumerate(ids)}
        suffixes = (suffix for one in asked for suffix in one.suffixes.values())
        rows = self._scorer.logits(prefix, suffixes, ids, on_prefix=kept.append)
        for one in asked:
            yield {
                path: next(rows)[[column[token] for token in tokens]]
                for path, tokens in one.tree.nodes.items()
            }

    def _frame(self, messages: Sequence[Message]) -> _Frame:
        chat, marks = self._chat, Marks()
        *before, last = messages
        if chat.system is not None and messages[0].role != "system":
            before = [Message.system(chat.system), *before]
        messages = [*before, _with_mark(last, marks.item)]
        prepared = [chat.prepare(part) for message in messages for part in message.media]
        segments, media, at = marks.reveal(chat.template.render(messages), prepared)
        start = at
        while start and _is_white(segments[start - 1]):
            start -= 1
        if not start or not isinstance(segments[start - 1], MediaSlot):
            start = at  # white space behind a text belongs to it
        num_before = sum(isinstance(segment, MediaSlot) for segment in segments[:at])
        shared, rest = media[:num_before], media[num_before:]
        prefix = self._encode(segments[:start], shared, is_first=True)
        return _Frame(prefix, tuple(segments[start:at]), tuple(segments[at:]), tuple(rest))

    def _ask(self, frame: _Frame, question: Question, wording: Wording, name: str) -> _Asked:
        segments, media = list(frame.opening), []
        for part in question_parts(question, wording):
            if isinstance(part, str):
                segments.append(TextSegment(part, literal=True))
            else:
                segments.append(MediaSlot(part.modality))
                media.append(self._chat.prepare(part))
        piece = self._encode([*segments, *frame.closing], [*media, *frame.media])
        tree = self._tree(question)
        piece = join([piece, _tokens(tree.lead)])
        deepest = max(len(path) for path in tree.nodes) - len(tree.lead)
        length, limit = len(frame.prefix.encoded), self._chat.context_length
        if length + len(piece.encoded) + deepest > limit:
            raise ContextTooLongError(
                f"{name} has {len(piece.encoded) + deepest} positions and the input before it "
                f"{length}, but the model reads {limit}: shorten the question or the input"
            )
        return _Asked(question, tree, piece)

    def _tree(self, question: Question) -> LabelTree:
        """Return the labels of a question.

        Raises:
            PromptError: labels that are the same tokens.
        """
        tokenizer = self._chat.tokenizer
        if isinstance(question, Predicate):
            return LabelTree([spellings(words, tokenizer) for words in (YES, NO)], ["yes", "no"])
        if isinstance(question, Choice) and question.spelled:
            names = [option.text for option in question.options]
            end = self._end
            return LabelTree([[(*spellings([n], tokenizer)[0], end)] for n in names], names)
        names = codes_of(question)
        return LabelTree([spellings([name, f" {name}"], tokenizer) for name in names], names)

    @property
    def _end(self) -> int:
        """Return the token that ends an answer.

        Raises:
            PromptError: neither the template nor the tokenizer has one.
        """
        ends = [self._chat.tokenizer.token_to_id(stop) for stop in self._chat.template.stop]
        ends.append(self._chat.tokenizer.eos_id)
        found = next((end for end in ends if end is not None), None)
        if found is None:
            raise PromptError(
                "spelled choices need a token that ends an answer, and the checkpoint names none: "
                "leave `spelled` out"
            )
        return found

    def _encode(
        self, segments: Sequence[Segment], media: Sequence[Any], *, is_first: bool = False
    ) -> ProcessedPrompt:
        chat = self._chat
        slots = [segment for segment in segments if isinstance(segment, MediaSlot)]
        lengths = [
            chat.model.span_length(slot.modality, one)
            for slot, one in zip(slots, media, strict=True)
        ]
        image_id = chat.config.tokens.image_id if is_first else None
        encoded = encode(segments, chat.tokenizer, lengths, image_id=image_id, add_bos=is_first)
        return ProcessedPrompt(encoded, tuple(media))


def _conversation(given: object) -> list[Message]:
    """Return the messages of an input; the last is the user's, whose end the questions are.

    Raises:
        PromptError: nothing in it.
    """
    several: list[Any] = list(given) if isinstance(given, list | tuple) else [given]
    if any(isinstance(one, Message) for one in several):
        check_conversation(several)
        if several[-1].role != "user":
            several.append(Message.user("A question about this conversation."))
        if not several[-1].text.strip() and not several[-1].media:
            raise PromptError("the last message of the input is empty: put something into it")
        return several
    parts = [part_of(one) for one in several]
    if not any(isinstance(part, MediaPart) or part.text.strip() for part in parts):
        raise PromptError("the input is empty: give a text, a picture or messages")
    return [Message("user", tuple(parts))]


def _hint(given: object) -> str:
    """Return what to do where a text of the input was meant as a picture; "" where none was.

    Texts of messages are not looked at: they come from strangers too, whom it does not concern
    which files there are.
    """
    for one in given if isinstance(given, list | tuple) else [given]:
        if isinstance(one, str) and 0 < len(one) <= _LONGEST_PATH:
            with suppress(OSError, RuntimeError, ValueError):  # it is no path at all
                if pathlib.Path(one).expanduser().is_file():
                    return f" (the text {one!r} names a file: give a picture as Path({one!r}))"
    return ""


def _with_mark(last: Message, mark: str) -> Message:
    """Return the message with a mark at its end, on a line of its own where text stands before."""
    parts = list(last.parts)
    gap = "\n" if last.text.strip() else ""
    if parts and isinstance(parts[-1], TextPart):
        parts[-1] = TextPart(parts[-1].text + gap + mark)
    else:
        parts.append(TextPart(gap + mark))
    return replace(last, parts=tuple(parts), written=None)


def _answer(question: Question, shares: tuple[float, ...]) -> Answer:
    if isinstance(question, Predicate):
        return PredicateAnswer(shares[0], question.name)
    if isinstance(question, Choice):
        values = tuple(option.value for option in question.options)
        return ChoiceAnswer(values[shares.index(max(shares))], shares, values, question.name)
    labels = tuple(label for label, _, _ in question.steps)
    numbers = tuple(value for _, _, value in question.steps)
    expected = sum(share * value for share, value in zip(shares, numbers, strict=True))
    return ScoreAnswer(expected, shares, labels, numbers, question.name)


def _tokens(ids: Sequence[int]) -> ProcessedPrompt:
    return ProcessedPrompt(EncodedPrompt(list(ids), [False] * len(ids)), ())


def _is_white(segment: Segment) -> bool:
    return isinstance(segment, TextSegment) and not segment.text.strip()


def _check_questions(questions: object) -> None:
    """Refuse what is no list of questions.

    Raises:
        PromptError: none, or something else among them.
    """
    if isinstance(questions, str) or not isinstance(questions, Sequence) or not questions:
        raise PromptError(f"questions must be a list of at least one, got {shown(questions)}")
    for one in questions:
        if not isinstance(one, Question):
            raise PromptError(f"a question must be a Predicate, Choice or Score, got {shown(one)}")
