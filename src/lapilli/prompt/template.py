r"""Conversation templates of the original, and the segments that every template renders to.

    messages -> turns (role name, content segments | None) -> style -> segments

`TEMPLATES` has them by every name that they have there. Knows roles, separators and where a picture
goes. Must not know tokenizers, files or torch.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from types import MappingProxyType
from typing import Literal, Protocol, runtime_checkable

from lapilli.errors import PromptError
from lapilli.prompt.message import MediaPart, Message, Said


@dataclass(frozen=True, slots=True)
class TextSegment:
    """A part of a prompt's text.

    `trainable`: the loss counts its tokens. `literal`: typed by a person, special tokens inside it
    stay text. `said`: its tokens, where a model said it.
    """

    text: str
    trainable: bool = False
    literal: bool = False
    said: Said | None = None


@dataclass(frozen=True, slots=True)
class MediaSlot:
    """The place of one medium."""

    modality: str = "image"


Segment = TextSegment | MediaSlot
Style = Literal["single", "two", "mpt", "plain", "llama_2"]
Turn = tuple[str, "list[Segment] | None"]


NOTHING_TO_ANSWER = "the last message is the assistant's answer: add a message of the user"


def to_text(segments: Iterable[Segment]) -> str:
    """Return the prompt as one string, as the original shows it: never to be encoded."""
    return "".join(s.text if isinstance(s, TextSegment) else "<image>" for s in segments)


def _trainable(segments: Iterable[Segment]) -> list[Segment]:
    """Return the same segments with every text counted by the loss."""
    return [replace(s, trainable=True) if isinstance(s, TextSegment) else s for s in segments]


@runtime_checkable
class Template(Protocol):
    """A way to render messages: one of ours, a checkpoint's own, or a class of a user."""

    @property
    def name(self) -> str:
        """Name by which people ask for it."""

    @property
    def stop(self) -> tuple[str, ...]:
        """Strings that end an answer."""

    def render(self, messages: Sequence[Message], *, open_turn: bool = True) -> list[Segment]:
        """Render a conversation, with the prompt for the answer or (training) without."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatTemplate:
    """A conversation format as data.

    `messages` and `offset` are the built-in examples (role, text) that stand before the first
    question. `system` holds everything before the first separator, `system_prefix` its part that a
    system message does not replace. `media_open` and `media_close` stand around every medium in
    training: the original's programs for asking leave them out, and so do we. `media_tokens` stand
    around every medium always: <im_start> and <im_end> of checkpoints with mm_use_im_start_end.
    `media_gap` stands between a medium and text that follows it; see `prompt.encode.media_gap`.

    Source: LLaVA conversation.py, reference behaviour of every `conv_templates` entry.
    """

    name: str
    system: str
    roles: tuple[str, str]
    style: Style
    sep: str
    sep2: str | None = None
    messages: tuple[tuple[str, str], ...] = ()
    offset: int = 0
    version: str = "Unknown"
    system_prefix: str = ""
    media_open: str = ""
    media_close: str = ""
    media_tokens: tuple[str, str] = ("", "")
    media_gap: str = field(default="", compare=False)  # of the tokenizer, not of the conversation

    @property
    def stop(self) -> tuple[str, ...]:
        """Strings that end an answer: `sep` for the styles with one separator, else `sep2`."""
        end = self.sep if self.style in ("single", "mpt") else self.sep2
        return (end,) if end else ()

    def render(self, messages: Sequence[Message], *, open_turn: bool = True) -> list[Segment]:
        """Render a conversation.

        Args:
            messages: an optional system message, then user and assistant in turn.
            open_turn: end with the prompt for the answer; the last message is the user's (or an
                empty one of the assistant). False for training: the last answer is closed. What
                follows an open prompt is trainable, the space before the first word included.

        Raises:
            PromptError: a role out of turn, a medium in an answer, nothing to answer, or a first
                message that the style cannot begin with.

        Note: a message without text and media counts as "to be generated", as in the original:
            only its role is written.
        """
        system, rest = _split_system(messages)
        turns: list[Turn] = [(role, [TextSegment(text)]) for role, text in self.messages]
        for message in rest:
            is_answer = message.role == "assistant"
            turns.append((self.roles[int(is_answer)], self._content(message, tagged=not open_turn)))
        if open_turn:
            _add_open_turn(turns, rest, self.roles[1])
        elif self.style == "plain":
            return _with_gaps(_caption_pair(turns, self.sep), self.media_gap)
        segments = self._layout(turns, _system_segments(self, system))
        return _with_gaps(segments, self.media_gap)

    def prompt(self, turns: Sequence[tuple[str, str | None]]) -> str:
        """Return the text of raw turns (role name, text or None) exactly as the original.

        Raises:
            PromptError: where the original raises too (an empty first llama_2 message, a second
                plain message).
        """
        segments: list[Turn] = [(r, [TextSegment(t)] if t else None) for r, t in turns]
        return to_text(self._layout(segments, [TextSegment(self.system)] if self.system else []))

    def _content(self, message: Message, *, tagged: bool) -> list[Segment] | None:
        leading = True
        content: list[Segment] = []
        for part in message.in_order:
            if isinstance(part, MediaPart):
                content += self._slot(part, message, tagged)
                is_line = leading and (message.text or self.style != "plain")
                if is_line and message.written is None:
                    content.append(TextSegment("\n"))
            elif part.text:
                leading = False
                content.append(TextSegment(part.text, literal=True, said=part.said))
        return content or None

    def _slot(self, part: MediaPart, message: Message, tagged: bool) -> list[Segment]:
        if message.role != "user":
            raise PromptError(
                f"a message of the {message.role} holds a medium ({part.modality}): "
                "only the user shows media"
            )
        if part.modality != "image":  # the marks are those of pictures
            return [MediaSlot(part.modality)]
        before, after = self.media_tokens
        if tagged:
            before, after = self.media_open + before, after + self.media_close
        return [TextSegment(before), MediaSlot(part.modality), TextSegment(after)]

    def _layout(self, turns: list[Turn], system: list[Segment]) -> list[Segment]:
        style = _llama_2 if self.style == "llama_2" else _chat
        segments = style(self, turns, system)
        return [s for s in segments if isinstance(s, MediaSlot) or s.text]


def _with_gaps(segments: list[Segment], gap: str) -> list[Segment]:
    """Return the segments with a gap wherever text follows a medium."""
    if not gap:
        return segments
    spaced = segments[:1]
    for before, segment in pairwise(segments):
        if isinstance(before, MediaSlot) and isinstance(segment, TextSegment):
            spaced.append(TextSegment(gap, trainable=segment.trainable))
        spaced.append(segment)
    return spaced


def _split_system(messages: Sequence[Message]) -> tuple[Message | None, Sequence[Message]]:
    first = messages[0] if messages else None
    system = first if first is not None and first.role == "system" else None
    rest = messages if system is None else messages[1:]
    for i, message in enumerate(rest):
        expected = "user" if i % 2 == 0 else "assistant"
        if message.role != expected:
            raise PromptError(
                f"message {i + (system is not None)} is from {message.role}, expected {expected}: "
                "after an optional system message user and assistant take turns"
            )
    return system, rest


def _system_segments(template: ChatTemplate, message: Message | None) -> list[Segment]:
    if message is None:
        return [TextSegment(template.system)] if template.system else []
    if message.media:
        raise PromptError("the system message holds a medium: only the user shows media")
    prefix: list[Segment] = [TextSegment(template.system_prefix)] if template.system_prefix else []
    text: list[Segment] = [TextSegment(message.text, literal=True)] if message.text else []
    return prefix + text


def _add_open_turn(turns: list[Turn], messages: Sequence[Message], assistant: str) -> None:
    """Add the assistant's open turn, unless an empty message already stands for it."""
    if not messages:
        raise PromptError("no message to answer: give at least one message of the user")
    if messages[-1].role == "user":
        turns.append((assistant, None))
    elif turns[-1][1] is not None:
        raise PromptError(NOTHING_TO_ANSWER)


def _caption_pair(turns: list[Turn], sep: str) -> list[Segment]:
    """Return media, caption, separator: the projector is trained without the question."""
    if len(turns) != 2:
        raise PromptError(
            f"a plain template trains on one question and one caption, found {len(turns)} messages"
        )
    slots = [s for s in turns[0][1] or [] if isinstance(s, MediaSlot)]
    if not slots:
        raise PromptError("a plain template trains on a medium and its caption: no medium found")
    return [*slots, *_trainable([*(turns[1][1] or []), TextSegment(sep)])]


def _chat(t: ChatTemplate, turns: list[Turn], system: list[Segment]) -> list[Segment]:
    """Lay out role, message, separator; some styles have no roles or no second separator."""
    colon = ":" if t.style in ("single", "two") else ""
    segments = list(system) if t.style == "plain" else [*system, TextSegment(t.sep)]
    for i, (role, content) in enumerate(turns):
        if content is None:
            segments.append(TextSegment(role + colon))
            continue
        ends_answer = i % 2 == 1
        end = t.sep2 if ends_answer and t.style in ("two", "plain") else t.sep
        if end is None:
            raise PromptError(f"template {t.name!r} has no separator after an answer")
        segments.append(TextSegment(role + colon))
        turn = [TextSegment(" " if colon else ""), *content, TextSegment(end)]
        segments += _trainable(turn) if ends_answer and i >= len(t.messages) else turn
    return segments


def _llama_2(t: ChatTemplate, turns: list[Turn], system: list[Segment]) -> list[Segment]:
    """Lay out [INST] question [/INST] answer, the system block inside the first question."""
    if turns and turns[0][1] is None:
        raise PromptError(f"the first message of template {t.name!r} is empty: ask something")
    if turns and turns[0][0] != t.roles[0]:
        raise PromptError(f"the first message of template {t.name!r} must come from {t.roles[0]}")
    segments: list[Segment] = []
    for i, (_, content) in enumerate(turns):
        if content is None:
            continue
        if i % 2:
            segments += _trainable([TextSegment(" "), *content, TextSegment(f" {t.sep2 or ''}")])
            continue
        # The original strips the leading separator of the whole prompt: the tokenizer writes it.
        segments.append(TextSegment(f"{t.sep if i else ''}[INST] "))
        if i == 0 and system:
            segments += [TextSegment("<<SYS>>\n"), *system, TextSegment("\n<</SYS>>\n\n")]
        segments += [*content, TextSegment(" [/INST]")]
    return segments


_POLITE = " The assistant gives helpful, detailed, and polite answers to the {0}'s questions."
_CHAT = "A chat between a curious {0} and an artificial intelligence assistant."
_HUMAN = (_CHAT + _POLITE).format("human")
_USER = (_CHAT + _POLITE).format("user")
_SEES = (
    "able to understand the visual content that the user provides, and assist the user with a "
    "variety of tasks using natural language."
)
_TAGGED = (
    f"{_CHAT.format('user')} The assistant is {_SEES}"
    "The visual content will be provided with the following format: <Image>visual content</Image>."
)
_LLAMA_2 = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, "
    "while being safe.  Your answers should not include any harmful, unethical, racist, sexist, "
    "toxic, dangerous, or illegal content. Please ensure that your responses are socially unbiased "
    "and positive in nature.\n\nIf a question does not make any sense, or is not factually "
    "coherent, explain why instead of answering something not correct. If you don't know the "
    "answer to a question, please don't share false information."
)
_LLAVA_LLAMA_2 = f"You are a helpful language and vision assistant. You are {_SEES}"
_SYSTEM_HEADER = "<|im_start|>system\n"
_MPT = (
    "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and "
    "honest answers."
)
_EXAMPLES = (
    ("Human", "What are the key differences between renewable and non-renewable energy sources?"),
    (
        "Assistant",
        "Renewable energy sources are those that can be replenished naturally in a relatively "
        "short amount of time, such as solar, wind, hydro, geothermal, and biomass. Non-renewable "
        "energy sources, on the other hand, are finite and will eventually be depleted, such as "
        "coal, oil, and natural gas. Here are some key differences between renewable and "
        "non-renewable energy sources:\n"
        "1. Availability: Renewable energy sources are virtually inexhaustible, while "
        "non-renewable energy sources are finite and will eventually run out.\n"
        "2. Environmental impact: Renewable energy sources have a much lower environmental impact "
        "than non-renewable sources, which can lead to air and water pollution, greenhouse gas "
        "emissions, and other negative effects.\n"
        "3. Cost: Renewable energy sources can be more expensive to initially set up, but they "
        "typically have lower operational costs than non-renewable sources.\n"
        "4. Reliability: Renewable energy sources are often more reliable and can be used in more "
        "remote locations than non-renewable sources.\n"
        "5. Flexibility: Renewable energy sources are often more flexible and can be adapted to "
        "different situations and needs, while non-renewable sources are more rigid and "
        "inflexible.\n"
        "6. Sustainability: Renewable energy sources are more sustainable over the long term, "
        "while non-renewable sources are not, and their depletion can lead to economic and social "
        "instability.\n",
    ),
)
_HUMAN_ROLES = ("Human", "Assistant")
_USER_ROLES = ("USER", "ASSISTANT")
_CHATML_ROLES = ("<|im_start|>user\n", "<|im_start|>assistant\n")

_LLAVA_V0 = ChatTemplate(
    name="llava_v0", system=_HUMAN, roles=_HUMAN_ROLES, style="single", sep="###"
)
_VICUNA_V1 = ChatTemplate(
    name="vicuna_v1",
    system=_USER,
    roles=_USER_ROLES,
    style="two",
    sep=" ",
    sep2="</s>",
    version="v1",
)
_LLAMA_2_CHAT = ChatTemplate(
    name="llama_2",
    system=_LLAMA_2,
    roles=_USER_ROLES,
    style="llama_2",
    sep="<s>",
    sep2="</s>",
    version="llama_v2",
)
_MPT_CHAT = ChatTemplate(
    name="mpt",
    system=_SYSTEM_HEADER + _MPT,
    system_prefix=_SYSTEM_HEADER,
    roles=_CHATML_ROLES,
    style="mpt",
    sep="<|im_end|>",
    version="mpt",
)
_CHATML = replace(_MPT_CHAT, name="chatml_direct", system=_SYSTEM_HEADER + "Answer the questions.")
_DEFAULT = replace(_LLAVA_V0, name="default", messages=_EXAMPLES, offset=len(_EXAMPLES))
_PLAIN = ChatTemplate(name="plain", system="", roles=("", ""), style="plain", sep="\n")


def _tagged(template: ChatTemplate, name: str) -> ChatTemplate:
    """Return the variant that puts every picture between tags."""
    return replace(
        template,
        name=name,
        version=name,
        system=_TAGGED,
        media_open="<Image>",
        media_close="</Image>",
    )


_ALL = (
    _DEFAULT,
    replace(_DEFAULT, name="v0"),
    replace(_VICUNA_V1, name="v1"),
    _VICUNA_V1,
    _LLAMA_2_CHAT,
    replace(_LLAMA_2_CHAT, name="mistral_instruct", system="", sep=""),
    _CHATML,
    replace(_CHATML, name="mistral_direct"),
    _PLAIN,
    replace(_PLAIN, name="v0_plain"),
    _LLAVA_V0,
    _tagged(_LLAVA_V0, "v0_mmtag"),
    replace(_VICUNA_V1, name="llava_v1", system=_HUMAN),
    _tagged(_VICUNA_V1, "v1_mmtag"),
    replace(_LLAMA_2_CHAT, name="llava_llama_2", system=_LLAVA_LLAMA_2),
    _MPT_CHAT,
)

TEMPLATES: Mapping[str, ChatTemplate] = MappingProxyType({t.name: t for t in _ALL})
"""Name -> template, in the order of the original."""

DEFAULT_TEMPLATE = "vicuna_v1"
"""The original's `default_conversation`."""
