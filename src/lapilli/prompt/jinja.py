"""Chat templates in jinja: a checkpoint's own, rendered as transformers does, and ours written so.

    messages -> the same with unguessable marks in place of what a person typed
      | jinja2, sandboxed
      v
    text with marks and the template's own image tokens -> segments

What a person typed is never looked at by the template, so a typed "<image>" or "</s>" stays text.
White space around it is, because templates trim. Knows nothing of tokenizers or files.
"""

import json
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import chain, pairwise
from typing import Any, Final

import jinja2

from lapilli.errors import PromptError, TemplateFileError
from lapilli.prompt.message import MediaPart, Message, TextPart
from lapilli.prompt.sandbox import budget_of, compile_template, pay
from lapilli.prompt.template import NOTHING_TO_ANSWER, ChatTemplate, MediaSlot, Segment, TextSegment

PLACEHOLDER = "<image>"
_MOST_SHOWN: Final = 300  # characters of an error
_STEPS: Final = 1_000_000
_STEPS_OF_MESSAGE: Final = 20_000
"""More with every message, as some templates look at all of them for each of them."""


class JinjaTemplate:
    """A chat template with the interface of `ChatTemplate`.

    Args:
        source: the jinja2 text of chat_template.jinja or tokenizer_config.json.
        bos_token: text of the token that the template may write first.
        eos_token: text of the token that the template may write last.
        image_token: what the template writes in the place of a picture.
        special_tokens: texts of further tokens that it may write, such as `pad_token`.
        file: where the text was read. What is wrong with the template is then a TemplateFileError
            that names it, else a PromptError.

    Raises:
        PromptError: a text that is no template.
    """

    name = "chat_template"

    def __init__(
        self,
        source: str,
        *,
        bos_token: str | None = None,
        eos_token: str | None = None,
        image_token: str = PLACEHOLDER,
        special_tokens: Mapping[str, str] | None = None,
        file: str | None = None,
    ) -> None:
        self.source = source
        self._file = file
        self._tokens = {
            **(special_tokens or {}),
            "bos_token": bos_token or "",
            "eos_token": eos_token or "",
        }
        self._image_token = image_token
        with self._named():
            self._template = self._compiled()

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Name the file in what is wrong with the template."""
        try:
            yield
        except PromptError as error:
            if self._file is None:
                raise
            raise TemplateFileError(f"{self._file}: {error}") from error

    def _compiled(self) -> jinja2.Template:
        try:
            self.source.encode()
            with budget_of(_STEPS):
                return compile_template(self.source)
        except jinja2.TemplateSyntaxError as error:
            raise PromptError(
                f"the checkpoint's chat template is not a template: line {error.lineno}: "
                f"{_short(error.message)}; choose one by name"
            ) from error
        except Exception as error:  # whatever a stranger's text makes of jinja2 and of Python
            raise PromptError(
                f"the checkpoint's chat template cannot be used: {_reason(error)}; "
                "choose one by name"
            ) from error

    @cached_property
    def stop(self) -> tuple[str, ...]:
        """Text that the template writes after an answer."""
        marks = _Marks(self._takes_parts, self._image_token)
        answered = [marks.hide(m) for m in (Message.user("Q"), Message.assistant("A"))]
        with self._named():
            text = self._run(answered, open_turn=False)
        end = text.partition(marks.mark(1))[2].strip()
        return (end,) if end else ()

    def render(self, messages: Sequence[Message], *, open_turn: bool = True) -> list[Segment]:
        """Render a conversation to segments as `ChatTemplate.render` does.

        With `open_turn=False` the answers are trainable: what follows the open prompt, up to and
        with the end token.

        Raises:
            PromptError: the template refuses the messages, fails, or loses a picture or a text.
        """
        messages = _without_open_turn(messages) if open_turn else messages
        marks = _Marks(self._takes_parts, self._image_token)
        hidden = [marks.hide(message) for message in messages]
        with self._named():
            text = self._run(hidden, open_turn=open_turn)
            marks.check(text, sum(part.modality == "image" for m in messages for part in m.media))
            ranges = [] if open_turn else self._answers(hidden, text)
        return marks.reveal(text, ranges)

    @cached_property
    def _takes_parts(self) -> bool:
        """True if the template iterates over content parts, False if content is a string to it."""
        marks = _Marks(True, self._image_token)
        try:
            text = self._run([marks.hide(Message.user("Q"))], open_turn=True)
        except PromptError:
            return False
        return marks.mark(0) in text and "'type'" not in text and '"type"' not in text

    def _run(self, messages: Sequence[dict[str, Any]], *, open_turn: bool) -> str:
        steps = _STEPS + _STEPS_OF_MESSAGE * len(messages)
        try:
            with budget_of(steps):
                text = self._template.render(
                    messages=list(messages),
                    add_generation_prompt=open_turn,
                    tools=None,
                    documents=None,
                    **self._tokens,
                )
                pay(len(text))
            text.encode()
        except Exception as error:  # a stranger's program: whatever it raises, it refuses
            raise PromptError(
                f"the checkpoint's chat template refuses these {len(messages)} messages "
                f"({_short(', '.join(str(m['role']) for m in messages))}): {_reason(error)}"
            ) from error
        return text

    def _answers(self, messages: Sequence[dict[str, Any]], text: str) -> list[tuple[int, int]]:
        """Return the ranges of `text` that the model has to write."""
        ranges = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._run(messages[:i], open_turn=True)
            after = self._run(messages[: i + 1], open_turn=False).rstrip("\n")
            if not (text.startswith(after) and after.startswith(before)):
                raise PromptError(
                    f"the checkpoint's chat template writes message {i} differently when more "
                    "follow, so it cannot be trained on: choose a template by name"
                )
            ranges.append((len(before), len(after)))
        return ranges


class _Marks:
    """Unguessable stand-ins for what a person typed, for one rendering."""

    def __init__(self, takes_parts: bool, image_token: str) -> None:
        self._nonce = secrets.token_hex(16)
        self._takes_parts = takes_parts
        self._image_token = image_token
        self._texts: list[TextPart | MediaPart] = []

    def mark(self, index: int) -> str:
        """Return the stand-in of the text with this number."""
        return f"[{self._nonce}:{index}]"

    def hide(self, message: Message) -> dict[str, Any]:
        """Return a message as chat templates expect it, marks in place of its texts."""
        content = self._parts(message) if self._takes_parts else self._string(message)
        return {"role": message.role, "content": content}

    def check(self, text: str, num_pictures: int) -> None:
        """Refuse a rendering that lost or doubled something.

        Raises:
            PromptError: a text or another medium that is missing, or another number of image tokens
                than of pictures.
        """
        for index, part in enumerate(self._texts):
            times = text.count(self.mark(index))
            if times != 1:
                what = (
                    f"medium {part.modality!r}"
                    if isinstance(part, MediaPart)
                    else f"text {part.text[:40]!r}"
                )
                raise PromptError(
                    f"the checkpoint's chat template writes the {what} {times} "
                    "times instead of once: choose a template by name"
                )
        slots = text.count(self._image_token)
        if slots != num_pictures:
            raise PromptError(
                f"the checkpoint's chat template wrote {slots} {self._image_token} for "
                f"{num_pictures} media: choose a template by name"
            )

    def reveal(self, text: str, answers: Sequence[tuple[int, int]]) -> list[Segment]:
        """Turn marks into what was typed and image tokens into slots; answers are trainable."""
        pattern = re.compile(rf"\[{self._nonce}:(\d+)\]|{re.escape(self._image_token)}")
        borders = {
            0,
            len(text),
            *chain(*answers),
            *chain(*(m.span() for m in pattern.finditer(text))),
        }
        segments: list[Segment] = []
        for start, end in pairwise(sorted(borders)):
            piece = text[start:end]
            counts = any(first <= start and end <= last for first, last in answers)
            found = pattern.fullmatch(piece)
            if found is None:
                segments.append(TextSegment(piece, trainable=counts))
            elif found.group(1) is None:
                segments.append(MediaSlot())
            else:
                part = self._texts[int(found.group(1))]
                if isinstance(part, MediaPart):
                    segments.append(MediaSlot(part.modality))
                    continue
                segments.append(TextSegment(part.text, counts, literal=True, said=part.said))
        return segments

    def _parts(self, message: Message) -> list[dict[str, str]]:
        if message.written is not None:  # templates move pictures, but leave text as it is
            return [{"type": "text", "text": self._string(message)}]
        found = []
        leading = True
        for part in message.parts:
            if isinstance(part, TextPart):
                found.append({"type": "text", "text": self._hide_text(part)})
                leading = leading and not part.text
            elif part.modality == "image":
                found.append({"type": "image"})
            else:  # no template knows its type: a mark in a text, as it stands for in a string
                line = "\n" if leading else ""
                found.append({"type": "text", "text": self._hide_medium(part) + line})
        return found

    def _string(self, message: Message) -> str:
        """Return one string, leading media on lines of their own, as LLaVA was trained."""
        text = ""
        leading = message.written is None
        for part in message.in_order:
            if isinstance(part, TextPart):
                text += self._hide_text(part)
                leading = leading and not part.text
            else:
                image = part.modality == "image"
                token = self._image_token if image else self._hide_medium(part)
                text += f"{token}\n" if leading else token
        return text

    def _hide_medium(self, part: MediaPart) -> str:
        self._texts.append(part)
        return self.mark(len(self._texts) - 1)

    def _hide_text(self, part: TextPart) -> str:
        core = part.text.strip()
        if not core:
            return part.text
        before, _, after = part.text.partition(core)
        self._texts.append(TextPart(core, part.said))
        return f"{before}{self.mark(len(self._texts) - 1)}{after}"


def _reason(error: Exception) -> str:
    """Return what went wrong, short enough for one line."""
    if isinstance(error, UnicodeEncodeError):
        return "it writes half of a surrogate pair, which is no text"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return _short(str(error)) or type(error).__name__


def _short(text: str | None) -> str:
    text = text or ""
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."


def _without_open_turn(messages: Sequence[Message]) -> Sequence[Message]:
    """Return the messages without an empty last answer: the one to be generated."""
    if not messages or messages[-1].role != "assistant":
        return messages
    if messages[-1].parts and messages[-1].text:
        raise PromptError(NOTHING_TO_ANSWER)
    return messages[:-1]


# Pictures that stand before the text of a message end with a new line, others do not.
_CONTENT = """\
{%- macro content(message) -%}
{%- if message['content'] is string -%}
{{ message['content'] }}
{%- else -%}
{%- set at = namespace(start=true) -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}
{{ @PICTURE }}{% if at.start %}{{ @LINE }}{% endif %}
{%- elif part['text'] -%}
{%- set at.start = false -%}
{{ part['text'] }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- set system = @SYSTEM -%}
{%- set turns = messages -%}
{%- if messages and messages[0]['role'] == 'system' -%}
{%- set system = @PREFIX + content(messages[0]) -%}
{%- set turns = messages[1:] -%}
{%- endif -%}
"""

_CHAT = """\
{{ system + @HEAD }}
{%- for message in turns -%}
{%- if message['role'] == 'assistant' -%}
{{ @ASSISTANT + @SPACE + content(message) + @ANSWERED }}
{%- else -%}
{{ @USER + @SPACE + content(message) + @ASKED }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ @ASSISTANT }}
{%- endif -%}
"""

_LLAMA_2 = """\
{%- for message in turns -%}
{%- if message['role'] == 'assistant' -%}
{{ @SPACE + content(message) + @ANSWERED }}
{%- else -%}
{{ ('' if loop.first else @ASKED) + '[INST] ' }}
{%- if loop.first and system -%}
{{ @OPEN + system + @CLOSE }}
{%- endif -%}
{{ content(message) + ' [/INST]' }}
{%- endif -%}
{%- endfor -%}
"""

# The text is cut at its pictures; a gap goes before every piece but the first and empty ones.
_GAPS = """\
{%- for piece in text.split(@TOKEN) -%}
{{ ('' if loop.first else @TOKEN) + ('' if loop.first or not piece else @GAP) + piece }}
{%- endfor -%}
"""


def with_gaps(source: str, gap: str, token: str = PLACEHOLDER) -> str:
    """Return a chat template that writes the same with a gap wherever text follows a picture.

    `token` is what the template writes for a picture, `gap` see `prompt.encode.media_gap`.
    """
    if not gap:
        return source
    # jinja2 leaves out one new line at the end of a template, but not at the end of a block.
    body = "{% set text %}" + source.removesuffix("\n") + "{% endset %}"
    return body + _written(_GAPS, {"TOKEN": token, "GAP": gap})


def to_jinja(template: ChatTemplate, image_token: str = PLACEHOLDER) -> str:
    """Return the text of the chat template that renders as `template` does.

    Raises:
        PromptError: captions (the plain style) are no conversation.
    """
    if template.style == "plain":
        raise PromptError(f"template {template.name!r} is for captions: it holds no conversation")
    before, after = template.media_tokens
    values = {
        "PICTURE": before + image_token + after,
        "LINE": "\n",
        "SYSTEM": template.system,
        "PREFIX": template.system_prefix,
    }
    if template.style == "llama_2":
        values |= {
            "SPACE": " ",
            "ANSWERED": f" {template.sep2 or ''}",
            "ASKED": template.sep,
            "OPEN": "<<SYS>>\n",
            "CLOSE": "\n<</SYS>>\n\n",
        }
        return _written(_CONTENT + _LLAMA_2, values)
    colon = "" if template.style == "mpt" else ":"
    values |= {
        # The separator and the built-in examples.
        "HEAD": template.prompt(template.messages).removeprefix(template.system),
        "USER": template.roles[0] + colon,
        "ASSISTANT": template.roles[1] + colon,
        "SPACE": " " if colon else "",
        "ASKED": template.sep,
        "ANSWERED": (template.sep2 if template.style == "two" else template.sep) or "",
    }
    return _written(_CONTENT + _CHAT, values)


def _written(text: str, values: dict[str, str]) -> str:
    """Write every @NAME as a string of jinja; longest names first, as some begin with others."""
    for name in sorted(values, key=len, reverse=True):
        text = text.replace(f"@{name}", json.dumps(values[name]))
    return text
