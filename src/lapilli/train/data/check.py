"""Data check: reads a data set once and shows what training would learn from it, or fail on.

record -> sample          unknown roles, placeholders, ids, turns
sample -> pictures        readable? the same content under another name?
sample -> ids and labels  with a model: too long, nothing supervised
sample -> TextSpans       for a terminal: pieces of text, supervised or not, without colours
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from itertools import groupby
from typing import Any, Final, Literal

import numpy as np
import torch

from lapilli.config.reader import shown
from lapilli.errors import DataError, LapilliError, MediaError
from lapilli.geometry import ImageSize
from lapilli.modality.image.decode import to_rgb
from lapilli.modality.image.pixels import PreparedImage
from lapilli.prompt.choose import Template
from lapilli.prompt.encode import EncodedPrompt
from lapilli.prompt.template import MediaSlot
from lapilli.prompt.tokenizer import Tokenizer
from lapilli.train.data.dataset import Dataset
from lapilli.train.data.encoder import SampleEncoder
from lapilli.train.data.sample import Sample
from lapilli.train.data.source import fetch_picture

Kind = Literal[
    "record",
    "turns",
    "image",
    "medium",
    "mended",
    "empty answer",
    "no labels",
    "too long",
    "duplicate id",
    "duplicate image",
]
NOTES: frozenset[Kind] = frozenset({"mended", "duplicate id", "duplicate image"})
"""Kinds that training takes as they are; all others end it, or cost a sample."""
_LONGEST: Final = 1000  # letters of a line: a tar archive may call a sample anything


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that was found about one sample."""

    kind: Kind
    where: str
    id: str
    text: str

    @property
    def is_error(self) -> bool:
        """Return whether training would fail or lose something."""
        return self.kind not in NOTES

    def __str__(self) -> str:
        """Return one line of printable letters, the place first."""
        name = "" if self.id == self.where else f" (id {shown(self.id)})"
        line = f"{self.where}{name}: {self.text}"
        line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)
        return line if len(line) <= _LONGEST else f"{line[:_LONGEST]}..."


@dataclass(frozen=True, slots=True)
class Summary:
    """Summary statistics of many numbers."""

    min: int
    median: int
    p95: int
    max: int
    total: int

    @classmethod
    def of(cls, values: Iterable[int]) -> "Summary | None":
        """Return summary statistics of the values, or None if there are none."""
        numbers = np.fromiter(values, np.int64)
        if not len(numbers):
            return None
        median, p95 = (int(np.quantile(numbers, q, method="inverted_cdf")) for q in (0.5, 0.95))
        return cls(int(numbers.min()), median, p95, int(numbers.max()), int(numbers.sum()))

    def __str__(self) -> str:
        """Return the statistics for a table."""
        return f"min {self.min}  median {self.median}  p95 {self.p95}  max {self.max}"


@dataclass(frozen=True, slots=True, kw_only=True)
class DataReport:
    """The result of `check`.

    Attributes:
        num_with_media: samples of those that could be read.
        num_text_only: the same without media.
        num_media: places of pictures in all samples.
        num_different_media: files or bytes behind them.
        words: of a sample, placeholders included.
        positions: of a sample, pictures included; None without a model.
        supervised: positions that the loss counts; None without a model.
        max_length: what `positions` was compared with; None: nothing.
    """

    source: str
    num_samples: int
    num_with_media: int
    num_text_only: int
    num_media: int
    num_different_media: int
    num_answers: int
    words: Summary | None
    positions: Summary | None
    supervised: Summary | None
    max_length: int | None
    findings: tuple[Finding, ...]

    @property
    def errors(self) -> tuple[Finding, ...]:
        """Return the findings that training would fail on, or lose a sample by."""
        return tuple(finding for finding in self.findings if finding.is_error)

    @property
    def notes(self) -> tuple[Finding, ...]:
        """Return the findings that are odd and do no harm."""
        return tuple(finding for finding in self.findings if not finding.is_error)

    @property
    def supervised_share(self) -> float | None:
        """Return the supervised positions as a part of all."""
        if self.positions is None or self.supervised is None:
            return None
        return self.supervised.total / self.positions.total

    def to_dict(self) -> dict[str, Any]:
        """Return the report for json.dumps."""
        return {
            **asdict(self),
            "supervised_share": self.supervised_share,
            "num_errors": len(self.errors),
            "num_notes": len(self.notes),
        }

    def to_text(self, *, limit: int = 20) -> str:
        """Return the report for people; at most `limit` lines of every kind of finding."""
        lines = [
            f"{self.source}: {self.num_samples} samples, {self.num_with_media} with images "
            f"({self.num_media} images, {self.num_different_media} different), "
            f"{self.num_text_only} without, {self.num_answers} answers",
            f"words       {self.words or 'none'}",
        ]
        if self.positions is not None and self.supervised is not None:
            room = "" if self.max_length is None else f"  of {self.max_length}"
            lines += [
                f"positions   {self.positions}{room}",
                f"supervised  {self.supervised}  ({self.supervised_share:.1%} of all positions)",
            ]
        for title, findings in (("error", self.errors), ("note", self.notes)):
            if findings:
                lines.append(f"{len(findings)} {title}{'s' * (len(findings) > 1)}")
                lines += _listed(findings, limit)
        return "\n".join(lines if self.findings else [*lines, "nothing is wrong"])


def _listed(findings: Sequence[Finding], limit: int) -> list[str]:
    counts: Counter[Kind] = Counter()
    lines = []
    for finding in findings:
        counts[finding.kind] += 1
        if counts[finding.kind] <= limit:
            lines.append(f"  {finding}")
    for kind, number in counts.items():
        if number > limit:
            lines.append(f"  ... and {number - limit} more of the kind {kind!r}")
    return lines


Progress = Callable[[int, int], None]


def check(
    dataset: Dataset,
    *,
    encoder: SampleEncoder | None = None,
    template: Template | None = None,
    max_length: int | None = None,
    progress: Progress | None = None,
) -> DataReport:
    """Read a data set and report what it is like, and what is wrong with it.

    Args:
        dataset: read from beginning to end; every different picture is opened once.
        encoder: counts positions and labels; None leaves both out. Its weights are not used.
        template: without an encoder, what turns have to suit; None: any order of turns is taken.
        max_length: positions that a sample may have.
        progress: called with the samples that are done and with how many there are.
    """
    checker = _Checker(encoder, template, max_length)
    dataset = dataset if encoder is None else dataset.declaring(encoder.modalities)
    for index in range(len(dataset)):
        checker.read(dataset, index)
        if progress is not None:
            progress(index + 1, len(dataset))
    return checker.report(", ".join(source.name for source in dataset.sources), len(dataset))


def size_only(size: ImageSize) -> PreparedImage:
    """Return a picture without pixels: enough to count its positions."""
    return PreparedImage(torch.empty(0, 3, 0, 0), size)


@dataclass(frozen=True, slots=True)
class Seen:
    """A picture that could be opened; `twin` is another name of the same content."""

    name: str
    size: ImageSize
    twin: str | None = None


class ImageChecker:
    """A memory of pictures: their sizes, why they cannot be opened, equal contents."""

    def __init__(self) -> None:
        self._seen: dict[object, Seen | str] = {}
        self._names: dict[bytes, str] = {}

    def __len__(self) -> int:
        return len(self._seen)

    def look(self, source: Any) -> Seen:  # noqa: ANN401 - whatever media/fetch takes
        """Open a picture, or remember it.

        Raises:
            MediaError: it cannot be fetched or decoded.
        """
        key = blake2b(source, digest_size=16).digest() if isinstance(source, bytes) else source
        known = self._seen.get(key)
        if known is None:
            try:
                known = self._open(source)
            except MediaError as error:
                known = str(error)
            first = known if isinstance(known, str) else Seen(known.name, known.size)
            self._seen[key] = first
        if isinstance(known, str):
            raise MediaError(known)
        return known

    def _open(self, source: Any) -> Seen:  # noqa: ANN401 - see look
        fetched = fetch_picture(source)
        image = to_rgb(fetched.data, name=fetched.name)
        twin = None
        if isinstance(fetched.data, bytes):
            digest = blake2b(fetched.data, digest_size=16).digest()
            first = self._names.setdefault(digest, fetched.name)
            twin = first if first != fetched.name else None
        return Seen(fetched.name, ImageSize(image.height, image.width), twin)


class _Checker:
    """Numbers and findings of a pass through a data set."""

    def __init__(
        self, encoder: SampleEncoder | None, template: Template | None, max_length: int | None
    ) -> None:
        self._encoder, self._template, self._max_length = encoder, template, max_length
        self._images = ImageChecker()
        self._ids: dict[str, str] = {}
        self._findings: list[Finding] = []
        self._num_media: list[int] = []
        self._words: list[int] = []
        self._positions: list[int] = []
        self._supervised: list[int] = []
        self._num_answers = 0

    def _add(self, kind: Kind, sample: Sample, text: object) -> None:
        self._findings.append(Finding(kind, sample.where, sample.id, str(text)))

    def read(self, dataset: Dataset, index: int) -> None:
        """Check one sample."""
        try:
            sample = dataset.sample(index)
        except DataError as error:
            sample = Sample(dataset.id(index), (), dataset.where(index))
            text = str(error).removeprefix(sample.label).removeprefix(sample.where)
            self._add("record", sample, text.removeprefix(": ").strip())
            return
        self._num_media.append(len(sample.media))
        self._words.append(sample.words)
        for note in sample.notes:
            self._add("mended", sample, note)
        self._check_id(sample)
        self._check_answers(sample)
        items = self._check_media(sample)
        if self._encoder is None:
            self._check_turns(sample)
        elif len(items) == len(sample.media):
            self._check_row(sample, items, self._encoder)

    def _check_id(self, sample: Sample) -> None:
        first = self._ids.setdefault(sample.id, sample.where)
        if first != sample.where:
            self._add("duplicate id", sample, f"{first} has the same id")

    def _check_answers(self, sample: Sample) -> None:
        answers = [message.text for message in sample.messages if message.role == "assistant"]
        self._num_answers += len(answers)
        empty = [str(i + 1) for i, text in enumerate(answers) if not text.strip()]
        if empty:
            self._add("empty answer", sample, f"empty answer (number {', '.join(empty)})")
        if not answers:
            self._add("no labels", sample, "no answer to learn from")

    def _check_media(self, sample: Sample) -> list[Any]:
        """Return the media that can be read, pictures without their pixels."""
        items: list[Any] = []
        for part in sample.media:
            if part.modality != "image":
                try:
                    items.append(self._encoder and self._encoder.prepare(part))
                except LapilliError as error:
                    self._add("medium", sample, error)
                continue
            try:
                seen = self._images.look(part.source)
            except MediaError as error:
                self._add("image", sample, error)
                continue
            if seen.twin is not None:
                self._add("duplicate image", sample, f"{seen.name} is the same as {seen.twin}")
            items.append(size_only(seen.size))
        return items

    def _check_turns(self, sample: Sample) -> None:
        if self._template is None:
            return
        try:
            self._template.render(sample.messages, open_turn=False)
        except LapilliError as error:
            self._add("turns", sample, error)

    def _check_row(self, sample: Sample, items: list[Any], encoder: SampleEncoder) -> None:
        try:
            prompt = encoder.encode_prompt(sample, encoder.count(sample, items))
        except LapilliError as error:
            self._add("turns", sample, error)
            return
        supervised = sum(prompt.loss_mask[1:])
        self._positions.append(len(prompt))
        self._supervised.append(supervised)
        if not supervised:
            self._add("no labels", sample, "no supervised token")
        if self._max_length is not None and len(prompt) > self._max_length:
            left = sum(prompt.loss_mask[1 : self._max_length])
            text = f"{len(prompt)} positions, more than {self._max_length}: {left} of {supervised} "
            self._add("too long", sample, text + "supervised ones would be left")

    def report(self, source: str, num_samples: int) -> DataReport:
        """Return everything that was found."""
        has_media = np.array(self._num_media, np.int64) > 0
        return DataReport(
            source=source,
            num_samples=num_samples,
            num_with_media=int(has_media.sum()),
            num_text_only=int((~has_media).sum()),
            num_media=sum(self._num_media),
            num_different_media=len(self._images),
            num_answers=self._num_answers,
            words=Summary.of(self._words),
            positions=Summary.of(self._positions),
            supervised=Summary.of(self._supervised),
            max_length=self._max_length,
            findings=tuple(self._findings),
        )


@dataclass(frozen=True, slots=True)
class TextSpan:
    """A piece of text.

    Attributes:
        text: as the model reads it; of a medium its name and positions.
    """

    text: str
    supervised: bool = False
    is_media: bool = False


def rendered(sample: Sample, template: Template) -> list[TextSpan]:
    """Return the sample as a template writes it, without tokens.

    Raises:
        DataError: turns that the template cannot have.
    """
    with sample.named_in_errors():
        segments = template.render(sample.messages, open_turn=False)
    found = [
        TextSpan(f"<{segment.modality}>", is_media=True)
        if isinstance(segment, MediaSlot)
        else TextSpan(segment.text, segment.trainable)
        for segment in segments
    ]
    return _joined(found)


def tokenized(sample: Sample, encoder: SampleEncoder, images: ImageChecker) -> list[TextSpan]:
    """Return the sample as the model reads it, token by token, with the sizes of its pictures.

    Raises:
        DataError: a picture that cannot be opened, or turns that the template cannot have.
    """
    with sample.named_in_errors():
        media = [
            size_only(images.look(part.source).size)
            if part.modality == "image"
            else encoder.prepare(part)
            for part in sample.media
        ]
        prompt = encoder.encode_prompt(sample, encoder.count(sample, media))
    return text_spans(prompt, encoder.tokenizer)


def text_spans(prompt: EncodedPrompt, tokenizer: Tokenizer) -> list[TextSpan]:
    """Return an encoded sample as text: every token is shown, also special ones."""
    found, at = [], 0
    for span in prompt.spans:
        found += _text_of(prompt, at, span.start, tokenizer)
        label = f"<{span.modality}: {span.length} positions>"
        found.append(TextSpan(label, is_media=True))
        at = span.start + span.length
    return found + _text_of(prompt, at, len(prompt), tokenizer)


def _text_of(prompt: EncodedPrompt, start: int, end: int, tokenizer: Tokenizer) -> list[TextSpan]:
    out = []
    for supervised, places in groupby(range(start, end), key=prompt.loss_mask.__getitem__):
        data = b"".join(tokenizer.token_bytes(prompt.input_ids[i]) for i in places)
        out.append(TextSpan(data.decode("utf-8", "replace"), supervised))
    return out


def _joined(found: Sequence[TextSpan]) -> list[TextSpan]:
    """Join neighbours of one kind."""
    out: list[TextSpan] = []
    for kind, group in groupby(found, key=lambda s: (s.supervised, s.is_media)):
        if kind[1]:
            out += group
        else:
            out.append(TextSpan("".join(s.text for s in group), *kind))
    return out
