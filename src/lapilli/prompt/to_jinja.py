"""A conversation format as the text of a chat template: what other programs than ours read.

Knows the styles of template.py; must not know files.
"""

import json

from lapilli.errors import PromptError
from lapilli.prompt.jinja import PLACEHOLDER
from lapilli.prompt.template import ChatTemplate

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
    """A chat template that writes the same with a gap wherever text follows a picture.

    Args:
        source: of the chat template.
        gap: see `prompt.encode.media_gap`; nothing leaves the template as it is.
        token: what the template writes for a picture.
    """
    if not gap:
        return source
    # jinja2 leaves out one new line at the end of a template, but not at the end of a block.
    body = "{% set text %}" + source.removesuffix("\n") + "{% endset %}"
    return body + _written(_GAPS, {"TOKEN": token, "GAP": gap})


def to_jinja(template: ChatTemplate, image_token: str = PLACEHOLDER) -> str:
    """The chat template that renders as `template` does.

    Args:
        template: of the original, or one like it.
        image_token: what stands for a picture.

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
        "HEAD": _head(template),
        "USER": template.roles[0] + colon,
        "ASSISTANT": template.roles[1] + colon,
        "SPACE": " " if colon else "",
        "ASKED": template.sep,
        "ANSWERED": (template.sep2 if template.style == "two" else template.sep) or "",
    }
    return _written(_CONTENT + _CHAT, values)


def _head(template: ChatTemplate) -> str:
    """What follows the system text: the separator and the built-in examples."""
    return template.prompt(template.messages).removeprefix(template.system)


def _written(text: str, values: dict[str, str]) -> str:
    """Every @NAME as a string of jinja; the longest names first, as some begin with others."""
    for name in sorted(values, key=len, reverse=True):
        text = text.replace(f"@{name}", json.dumps(values[name]))
    return text
