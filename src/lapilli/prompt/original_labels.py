r"""Training ids and labels exactly as the original computes them, its mistakes included.

Only the drop-in names use this. Our own training takes `encode(...).labels`, which follows
characters; the original counts tokens of separately tokenized rounds and compares the sum with the
whole, and where they differ it throws the sample away by masking everything.

    v1          rounds end with sep2, an answer begins behind " ASSISTANT: "
    llama_2     rounds end with sep2, an answer begins behind "[/INST] "
    mpt         rounds of two turns (the first with the system), counts drift by the end token
    plain       everything behind the picture
    v0          "### Human: ...\n" turns; of a human turn all but the first two tokens is masked

Source: LLaVA train.py, the preprocess_* functions; golden cases `_labels`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from lapilli.errors import PromptError
from lapilli.prompt.encode import IGNORE_INDEX
from lapilli.prompt.template import ChatTemplate
from lapilli.prompt.tokenizer import Tokenizer

PLACEHOLDER_TEXT = "<image>"
PLACEHOLDER_INDEX = -200
SPEAKERS = ("human", "gpt")

Turns = Sequence[tuple[str, str]]
"""(human or gpt, text) of a record."""


@dataclass(frozen=True, slots=True)
class OriginalSample:
    """One record. `mismatch` is (counted, actual) where the original masked everything."""

    input_ids: list[int]
    labels: list[int]
    mismatch: tuple[int, int] | None = None


def show_images_first(text: str, version: str, *, use_start_end: bool = False) -> str:
    """Move the picture of a turn to the front of its text, as multimodal training reads it.

    Note: several placeholders become one, as in the original.
    """
    if PLACEHOLDER_TEXT in text:
        text = f"{PLACEHOLDER_TEXT}\n{text.replace(PLACEHOLDER_TEXT, '').strip()}".strip()
        if "mmtag" in version:
            text = text.replace(PLACEHOLDER_TEXT, f"<Image>{PLACEHOLDER_TEXT}</Image>")
    shown = f"<im_start>{PLACEHOLDER_TEXT}<im_end>" if use_start_end else PLACEHOLDER_TEXT
    return text.replace(PLACEHOLDER_TEXT, shown)


def image_token_ids(text: str, tokenizer: Tokenizer) -> list[int]:
    """Return ids with -200 for every `<image>`: each chunk on its own, BOS kept once.

    Source: LLaVA mm_utils.py tokenizer_image_token.
    """
    chunks = [_ids(chunk, tokenizer) for chunk in text.split(PLACEHOLDER_TEXT)]
    skipped = int(bool(chunks[0]) and chunks[0][0] == tokenizer.bos_id)
    ids = chunks[0][:skipped]
    for i, chunk in enumerate(chunks):
        ids += [PLACEHOLDER_INDEX] * bool(i) + chunk[skipped:]
    return ids


def original_sample(
    turns: Turns,
    template: ChatTemplate,
    tokenizer: Tokenizer,
    *,
    has_image: bool,
    max_length: int | None = None,
    pad_id: int | None = None,
) -> OriginalSample:
    """Return ids and labels of one conversation.

    The turns are those after `show_images_first`, the template is the original's
    `default_conversation`. Text with pictures is never truncated; without `max_length`, the
    tokenizer's model_max_length, no text is. Without `pad_id` the tokenizer's counts.

    Raises:
        PromptError: where the original raises: a speaker that is neither human nor gpt, turns that
            do not alternate, a plain record that is not one picture and one caption.
    """
    pad_id = tokenizer.pad_id if pad_id is None else pad_id
    job = _Job(template, tokenizer, has_image, max_length, pad_id)
    if template.style == "plain":
        return _plain(job, turns)
    if template.style == "llama_2":
        return _rounds(job, turns, "[/INST] ")
    if template.version.startswith("v1"):
        return _rounds(job, turns, f"{template.sep}{template.roles[1]}: ")
    if template.version == "mpt":
        return _rounds(job, turns, template.sep + template.roles[1], in_pairs=True)
    return _signals(job, turns)


@dataclass(frozen=True, slots=True)
class _Job:
    template: ChatTemplate
    tokenizer: Tokenizer
    has_image: bool
    max_length: int | None
    pad_id: int | None

    def ids(self, text: str) -> list[int]:
        """Return the ids of the whole conversation; text without pictures is truncated."""
        return self.all_ids(text)[: None if self.has_image else self.max_length]

    def all_ids(self, text: str) -> list[int]:
        """Return the ids of a part, with its BOS."""
        return (image_token_ids if self.has_image else _ids)(text, self.tokenizer)


def _ids(text: str, tokenizer: Tokenizer) -> list[int]:
    return [*tokenizer.encode(text), *tokenizer.suffix_ids]


def _rounds(job: _Job, turns: Turns, separator: str, *, in_pairs: bool = False) -> OriginalSample:
    """Mask round by round by counted lengths, behind `separator` an answer begins."""
    for speaker, _ in turns:
        if speaker not in SPEAKERS:
            raise PromptError(f"a turn is from {speaker!r}: expected human or gpt")
    turns = turns[1:] if turns and turns[0][0] == "gpt" else turns
    for i, (speaker, _) in enumerate(turns):
        if speaker != SPEAKERS[i % 2]:
            raise PromptError(f"turn {i} is from {speaker}: human and gpt must take turns")
    names = dict(zip(SPEAKERS, job.template.roles, strict=True))
    text = job.template.prompt([(names[speaker], said) for speaker, said in turns])
    ids = job.ids(text)
    labels = list(ids)
    at, surplus = (0, 1) if in_pairs else (1, 2)  # tokens counted too many before an answer
    _ignore(labels, 0, at)
    for i, part in enumerate(_parts(text, job.template, in_pairs)):
        halves = part.split(separator)
        if not part or len(halves) != 2:
            break
        shift = _shift(job, in_pairs) if i else 0
        instruction = len(job.all_ids(halves[0] + separator)) - surplus + shift
        _ignore(labels, at, at + instruction)
        at += len(job.all_ids(part)) + shift
    _ignore(labels, at, len(labels))
    actual = sum(token != job.pad_id for token in ids)
    if at != actual and (job.max_length is None or at < job.max_length):
        return OriginalSample(ids, [IGNORE_INDEX] * len(ids), (at, actual))
    return OriginalSample(ids, labels)


def _shift(job: _Job, in_pairs: bool) -> int:
    """Return what the original adds to the counts of a later round, by tokenizer."""
    if job.template.style == "llama_2":
        return 0
    is_legacy = bool(getattr(job.tokenizer, "legacy", False))
    return int(is_legacy) if in_pairs else -int(not is_legacy)


def _parts(text: str, template: ChatTemplate, in_pairs: bool) -> list[str]:
    """Cut a conversation into rounds; in pairs the first one has the system text too."""
    if not in_pairs:
        return text.split(template.sep2)
    pieces = text.split(template.sep)
    groups = [pieces[:3], *(pieces[i : i + 2] for i in range(3, len(pieces), 2))]
    return [template.sep.join(group) for group in groups]


def _plain(job: _Job, turns: Turns) -> OriginalSample:
    if len(turns) != 2 or PLACEHOLDER_TEXT not in turns[0][1]:
        raise PromptError(
            "a plain record is one human turn with <image> and one caption, found "
            f"{len(turns)} turns"
        )
    ids = image_token_ids(PLACEHOLDER_TEXT + turns[1][1] + job.template.sep, job.tokenizer)
    labels = list(ids)
    _ignore(labels, 0, len(image_token_ids(PLACEHOLDER_TEXT, job.tokenizer)))
    return OriginalSample(ids, labels)


def _signals(job: _Job, turns: Turns) -> OriginalSample:
    """Mask the oldest format: every part is counted with a BOS of its own and so runs ahead."""
    names = dict(zip(SPEAKERS, job.template.roles, strict=True))
    header = f"{job.template.system}\n\n"
    parts = [f"### {names.get(speaker, 'unknown')}: {said}\n" for speaker, said in turns]
    ids = job.ids(f"{header}{''.join(parts)}### ")
    labels = list(ids)
    at = len(job.ids(header))
    _ignore(labels, 0, at)
    for (speaker, _), part in zip(turns, parts, strict=True):
        length = len(job.ids(part))
        if speaker == "human":
            _ignore(labels, at + 2, at + length)
        at += length
    return OriginalSample(ids, labels)


def _ignore(labels: list[int], start: int, end: int) -> None:
    for i in range(max(start, 0), min(end, len(labels))):
        labels[i] = IGNORE_INDEX
