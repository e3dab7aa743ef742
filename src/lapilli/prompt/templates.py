"""Conversation templates of the original, by every name that they have there.

Data only. Source: LLaVA conversation.py, `conv_templates`; the texts are what checkpoints were
trained with, so not a letter may change (double spaces and missing spaces included).
"""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from lapilli.prompt.template import ChatTemplate

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
