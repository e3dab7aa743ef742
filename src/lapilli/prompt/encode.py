r"""Encoding of a conversation: ids, loss mask and media spans, in one pass.

    segments  "USER: " | slot | "\nWhat?" ... "ASSISTANT:" | " A boat.</s>"*    (* trainable)
      gaps    the text between two media, one tokenizer call each (LLaVA cuts there too)
      tokens  with the characters they stand for -> trainable where their last character is
      spans   as many positions as the medium has features, or none where it is looked at

Knows segments and tokenizers; must not know where features come from.
"""

from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass

from lapilli.errors import MediaCountMismatchError, PromptError
from lapilli.prompt.message import Said
from lapilli.prompt.template import MediaSlot, Segment, TextSegment
from lapilli.prompt.tokenizer import Token, Tokenizer

PLACEHOLDER = 0
"""The id under a span: an id of every vocabulary, whose embedding is overwritten."""

IGNORE_INDEX = -100
"""The label of a position that the loss does not count."""


@dataclass(frozen=True, slots=True)
class Span:
    """Place of one medium: `length` positions of row `row` from `start` on.

    A medium of length 0 stands beside the sequence: positions from `start` on look at it.
    """

    row: int
    start: int
    length: int
    modality: str = "image"


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """One row: `input_ids` hold PLACEHOLDER under the spans, where `loss_mask` is False."""

    input_ids: list[int]
    loss_mask: list[bool]
    spans: tuple[Span, ...] = ()

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def labels(self) -> list[int]:
        """Ids where the loss counts, IGNORE_INDEX elsewhere (not shifted)."""
        pairs = zip(self.input_ids, self.loss_mask, strict=True)
        return [token if counts else IGNORE_INDEX for token, counts in pairs]


def encode(
    segments: Sequence[Segment],
    tokenizer: Tokenizer,
    lengths: Sequence[int],
    *,
    image_id: int | None = None,
    add_bos: bool = True,
) -> EncodedPrompt:
    """Encode rendered segments.

    Args:
        segments: what a template rendered.
        tokenizer: of the language model.
        lengths: positions of every medium, in the order of the slots; 0 of one beside the sequence.
        image_id: the vocabulary's own image token, for checkpoints in the layout of Hugging Face:
            then the text is tokenized whole, with that token in the place of each medium.
        add_bos: False where the segments go on after something else.

    Raises:
        MediaCountMismatchError: another number of lengths than of slots.
        PromptError: a negative length, text that is no Unicode, or an image token that the
            tokenizer does not cut.

    Source: LLaVA mm_utils.py tokenizer_image_token (BOS once, one call per gap); transformers'
        LlavaProcessor for `image_id`.
    """
    slots = [segment for segment in segments if isinstance(segment, MediaSlot)]
    if len(slots) != len(lengths):
        raise MediaCountMismatchError(
            f"the prompt has {len(slots)} places for media but {len(lengths)} media were given: "
            "give one medium for each place"
        )
    if any(length < 0 for length in lengths):
        raise PromptError(f"a medium takes 0 positions or more, found {list(lengths)}")
    _check_text(segments)
    if image_id is None:
        pieces = _encode_gaps(segments, tokenizer)
    else:
        pieces = _encode_whole(segments, tokenizer, image_id, len(slots))
    if add_bos:
        pieces[0] = _with_prefix(tokenizer, pieces[0])
    ids: list[int] = []
    mask: list[bool] = []
    spans: list[Span] = []
    for i, piece in enumerate(pieces):
        if i:
            slot, length = slots[i - 1], lengths[i - 1]
            spans.append(Span(0, len(ids), length, slot.modality))
            ids += [PLACEHOLDER] * length
            mask += [False] * length
        ids += [token for token, _ in piece]
        mask += [counts for _, counts in piece]
    return EncodedPrompt(ids, mask, tuple(spans))


def _check_text(segments: Sequence[Segment]) -> None:
    """Refuse halves of characters: escapes in JSON, and bytes that are no UTF-8, become such."""
    for segment in segments:
        if isinstance(segment, TextSegment) and not segment.text.isascii():
            try:
                segment.text.encode()
            except UnicodeEncodeError as error:
                raise PromptError(
                    f"the text has {segment.text[error.start]!a} in it, which is no character "
                    "(a lone surrogate): write the text in UTF-8"
                ) from error


Piece = list[tuple[int, bool]]
"""Ids of a gap, and whether the loss counts them."""


def _encode_gaps(segments: Sequence[Segment], tokenizer: Tokenizer) -> list[Piece]:
    """Tokenize the texts before, between and after the media, one call each."""
    gaps: list[list[TextSegment]] = [[]]
    for segment in segments:
        if isinstance(segment, MediaSlot):
            gaps.append([])
        else:
            gaps[-1].append(segment)
    return [_tokenize(gap, tokenizer) for gap in gaps]


def _encode_whole(
    segments: Sequence[Segment], tokenizer: Tokenizer, image_id: int, num_slots: int
) -> list[Piece]:
    """Tokenize everything in one call, and cut it at the image tokens afterwards."""
    token = tokenizer.id_to_token(image_id)
    texts = [TextSegment(token) if isinstance(s, MediaSlot) else s for s in segments]
    pieces: list[Piece] = [[]]
    for index, counts in _tokenize(texts, tokenizer, image_id):
        if index == image_id:
            pieces.append([])
        else:
            pieces[-1].append((index, counts))
    if len(pieces) - 1 != num_slots:
        raise PromptError(
            f"the tokenizer cut {len(pieces) - 1} image tokens {token!r} (id {image_id}) out of a "
            f"prompt with {num_slots} media: the token is not an added token of this tokenizer, or "
            "the template writes it itself"
        )
    return pieces


def media_gap(tokenizer: Tokenizer, image_id: int | None) -> str:
    """Return what has to stand between a medium and text after it for the ids of the original.

    The original makes ids of the text after a picture as of a text of its own, and SentencePiece
    writes a space before the first word of a text. A tokenizer that is given the whole prompt, and
    that writes this space at the very beginning alone (`legacy: false`), needs it in the text.

    It is a space, or nothing; without `image_id` the text is cut at the media anyway.
    """
    if image_id is None or image_id >= tokenizer.vocab_size:  # an id that no text stands for
        return ""
    token, word = tokenizer.id_to_token(image_id), "a"
    alone = tokenizer.encode(word, add_bos=False)

    def after(text: str) -> list[int]:
        ids = tokenizer.encode(token + text, add_bos=False)
        return ids[ids.index(image_id) + 1 :] if image_id in ids else alone

    return " " if after(word) != alone == after(f" {word}") else ""


def _with_prefix(tokenizer: Tokenizer, piece: Piece) -> Piece:
    """Put BOS first, unless the template has written it."""
    prefix = [(index, False) for index in tokenizer.prefix_ids]
    written = [index for index, _ in piece[: len(prefix)]] == list(tokenizer.prefix_ids)
    return piece if written else prefix + piece


def _tokenize(
    segments: Sequence[TextSegment], tokenizer: Tokenizer, image_id: int | None = None
) -> Piece:
    """Tokenize joined segments; a token is trainable where its last character is.

    An answer has the tokens that it was said in, where they are known.
    """
    text = "".join(segment.text for segment in segments)
    literal: list[tuple[int, int]] = []
    counts: list[bool] = []
    answers: list[tuple[int, int, Said]] = []
    for segment in segments:
        start = len(counts)
        counts += [segment.trainable] * len(segment.text)
        if segment.literal and segment.text:
            literal.append((start, len(counts)))
        if segment.said is not None and _says(segment, segment.said, tokenizer, image_id):
            answers.append((start, len(counts), segment.said))
    tokens = tokenizer.tokenize(text, literal=literal)
    # Bytes in the middle of a character may have no characters of their own.
    piece = [(token.id, counts[max(token.end - 1, token.start)]) for token in tokens]
    ends = [token.end for token in tokens]
    for start, end, said in reversed(answers):
        first, last = bisect(ends, start), bisect(ends, end)
        # White space before an answer belongs to it as far as the prompt did not end with it.
        while first and tokens[first - 1].id != said.after and _is_white(text, tokens[first - 1]):
            first -= 1
        begins = 0 < first < last and tokens[first - 1].id == said.after
        # Otherwise a token reaches over a border of the answer, and the text is cut anew.
        if begins and ends[last - 1] == end and not text[tokens[first].start : start].strip():
            piece[first:last] = [(index, counts[start]) for index in said.ids]
    return piece


def tokens_said(text: str, ids: Sequence[int], after: int, tokenizer: Tokenizer) -> Said | None:
    """Return the tokens of an answer's text, without what ended it; None: no part of them is it.

    Args:
        text: of the answer, without white space around it.
        ids: that were generated.
        after: last token of the prompt.
        tokenizer: of the language model.
    """
    fewest: Sequence[int] = ()
    for count in range(len(ids), 0, -1):
        found = _decoded(ids[:count], tokenizer)
        if found == text:
            fewest = ids[:count]
        elif fewest or found is None or len(found) < len(text):
            break
    return Said(tuple(fewest), after) if text and fewest else None


def _says(segment: TextSegment, said: Said, tokenizer: Tokenizer, image_id: int | None) -> bool:
    """Return whether tokens are those of a text, to this tokenizer too."""
    return image_id not in said.ids and _decoded(said.ids, tokenizer) == segment.text.strip()


def _decoded(ids: Sequence[int], tokenizer: Tokenizer) -> str | None:
    try:
        return tokenizer.decode(ids).strip()
    except PromptError:  # an id behind the vocabulary, which a model may have rows for
        return None


def _is_white(text: str, token: Token) -> bool:
    return token.end > token.start and text[token.start : token.end].isspace()
