"""Conversations of the original (llava.conversation): objects that programs fill and read.

The texts and styles live in lapilli.prompt; here are the mutable object and the names.
"""

import base64
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from io import BytesIO
from typing import Any

from PIL import Image

from lapilli.errors import MediaError
from lapilli.modality.image.pixels import pad_to_square
from lapilli.prompt.template import DEFAULT_TEMPLATE, TEMPLATES, ChatTemplate, Style

__all__ = ["Conversation", "SeparatorStyle", "conv_templates", "default_conversation"]

Content = str | tuple[str, Any, str] | None

CHAT_BACKGROUND = (122, 116, 104)  # the CLIP mean in 8 bits
CHAT_RESIZED = (336, 336)


class SeparatorStyle(Enum):
    """Ways of putting turns together."""

    SINGLE = auto()
    TWO = auto()
    MPT = auto()
    PLAIN = auto()
    LLAMA_2 = auto()


@dataclass
class Conversation:
    """A conversation that grows by append_message.

    Attributes:
        system: text before the first separator.
        roles: names of the two speakers.
        messages: [role, content]; content is text, (text, picture, mode) or None for the turn that
            is to be generated.
        offset: how many of the messages are built-in examples.
        sep_style: how the turns are put together.
        sep: separator after a turn, or after every turn of the first speaker.
        sep2: separator after a turn of the second speaker.
        version: decides in training how labels are masked.
        skip_next: kept for programs that read it.
    """

    system: str
    roles: list[str] | tuple[str, ...]
    messages: Any
    offset: int
    sep_style: SeparatorStyle = SeparatorStyle.SINGLE
    sep: str = "###"
    sep2: str | None = None
    version: str = "Unknown"
    skip_next: bool = field(default=False)

    @property
    def template(self) -> ChatTemplate:
        """Return the fields as our template."""
        style: Style = self.sep_style.name.lower()  # type: ignore[assignment]  # the same names
        return ChatTemplate(
            name="conversation",
            system=self.system,
            roles=(self.roles[0], self.roles[1]),
            style=style,
            sep=self.sep,
            sep2=self.sep2,
            version=self.version,
        )

    def get_prompt(self) -> str:
        """Return the conversation as one string, with `<image>` where pictures go.

        Raises:
            PromptError: where the original raises too (quirk 14).
        """
        return self.template.prompt(
            [(role, text[0] if isinstance(text, tuple) else text) for role, text in self._turns()]
        )

    def _turns(self) -> list[tuple[str, Content]]:
        """Return the turns; a picture given with the first is written in front of its text."""
        turns: list[tuple[str, Content]] = [(role, content) for role, content in self.messages]
        role, first = turns[0] if turns else ("", None)
        if not isinstance(first, tuple):
            return turns
        text = first[0].replace("<image>", "").strip()
        if "mmtag" not in self.version:
            return [(role, f"<image>\n{text}"), *turns[1:]]
        shown = (self.roles[0], "<Image><image></Image>")
        return [shown, (self.roles[1], "Received."), (role, text), *turns[1:]]

    def append_message(self, role: str, message: Content) -> None:
        """Add a turn; None leaves it to be generated."""
        self.messages.append([role, message])

    def process_image(
        self,
        image: Image.Image,
        image_process_mode: str,
        return_pil: bool = False,
        image_format: str = "PNG",
        max_len: int = 1344,
        min_len: int = 672,
    ) -> Image.Image | str:
        """Return the picture as the chat window sends it: a Pillow image, or its file in base64.

        Args:
            image: any Pillow image.
            image_process_mode: "Pad" (to a square), "Resize" (to 336x336), "Default" or "Crop"
                (left alone).
            return_pil: give the Pillow image.
            image_format: of the file.
            max_len: a longer side than this is brought down, in pixels.
            min_len: upper bound of the shorter side when that happens, in pixels.

        Raises:
            MediaError: an unknown mode.
        """
        if image_process_mode == "Pad":
            image = pad_to_square(image, CHAT_BACKGROUND)
        elif image_process_mode == "Resize":
            image = image.resize(CHAT_RESIZED)
        elif image_process_mode not in ("Default", "Crop"):
            raise MediaError(
                f"unknown image mode {image_process_mode!r}: use Pad, Resize, Crop or Default"
            )
        longer, shorter = max(image.size), min(image.size)
        if longer > max_len:
            ratio = longer / shorter
            short = int(min(max_len / ratio, min_len, shorter))
            long = int(short * ratio)
            image = image.resize((short, long) if image.height > image.width else (long, short))
        return image if return_pil else _in_base64(image, image_format)

    def get_images(self, return_pil: bool = False) -> list[Image.Image | str]:
        """Return the pictures of the first speaker's turns, each in its mode."""
        contents = [content for _, content in self.messages[self.offset :][::2]]
        return [
            self.process_image(content[1], content[2], return_pil=return_pil)
            for content in contents
            if isinstance(content, tuple)
        ]

    def to_gradio_chatbot(self) -> list[list[str | None]]:
        """Return pairs of question and answer, pictures as HTML."""
        pairs: list[list[str | None]] = []
        for index, (_, content) in enumerate(self.messages[self.offset :]):
            if index % 2:
                pairs[-1][-1] = content
            elif isinstance(content, tuple):
                text, image, _ = content
                picture = self.process_image(
                    image, "Default", return_pil=False, image_format="JPEG"
                )
                shown = f'<img src="data:image/jpeg;base64,{picture}" alt="user upload image" />'
                pairs.append([shown + text.replace("<image>", "").strip(), None])
            else:
                pairs.append([content, None])
        return pairs

    def copy(self) -> "Conversation":
        """Return a conversation that grows on its own."""
        return replace(self, messages=[[role, content] for role, content in self.messages])

    def dict(self) -> dict[str, Any]:
        """Return what the servers of the original log and send."""
        messages = self.messages
        if self.get_images():
            messages = [
                [role, content[0] if isinstance(content, tuple) else content]
                for role, content in messages
            ]
        return {
            "system": self.system,
            "roles": self.roles,
            "messages": messages,
            "offset": self.offset,
            "sep": self.sep,
            "sep2": self.sep2,
        }


def _in_base64(image: Image.Image, image_format: str) -> str:
    buffer = BytesIO()
    if image_format.upper() in ("JPEG", "JPG") and image.mode not in ("RGB", "L", "CMYK"):
        image = image.convert("RGB")
    try:
        image.save(buffer, format=image_format)
    except (OSError, KeyError) as error:
        raise MediaError(f"a picture cannot be saved as {image_format}: {error}") from error
    return base64.b64encode(buffer.getvalue()).decode()


def _build(template: ChatTemplate) -> Conversation:
    return Conversation(
        system=template.system,
        roles=template.roles,
        messages=[[role, text] for role, text in template.messages],
        offset=template.offset,
        sep_style=SeparatorStyle[template.style.upper()],
        sep=template.sep,
        sep2=template.sep2,
        version=template.version,
    )


def _build_all() -> dict[str, Conversation]:
    """Return one object per text, as in the original: `v1` and `vicuna_v1` are the same."""
    known: dict[ChatTemplate, Conversation] = {}
    return {
        name: known.setdefault(replace(template, name=""), _build(template))
        for name, template in TEMPLATES.items()
    }


conv_templates = _build_all()
default_conversation = conv_templates[DEFAULT_TEMPLATE]
"""Template that training takes labels from; a training program assigns another one."""
