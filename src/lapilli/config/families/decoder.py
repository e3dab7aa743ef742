"""config.json of a language model -> DecoderConfig or MptConfig.

Defaults are those of the transformers library, which leaves default values out of its files.
"""

from dataclasses import dataclass
from typing import Literal

from lapilli.config import ignored
from lapilli.config.model import Activation, DecoderConfig, MptConfig, RopeScaling, TextConfig
from lapilli.config.reader import (
    MOST_HEADS,
    MOST_LAYERS,
    MOST_POSITIONS,
    MOST_WIDTH,
    MOST_WORDS,
    KeyReader,
)
from lapilli.errors import ConfigError, UnsupportedModelError


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderDefaults:
    """What a Llama-shaped family means when its file leaves a key out."""

    intermediate_size: int
    max_positions: int
    vocab_size: int = 32000
    num_kv_heads: int | None = None
    sliding_window: int | None = None
    qkv_bias: bool = False


DECODERS = {
    "llama": DecoderDefaults(intermediate_size=11008, max_positions=2048),
    "mistral": DecoderDefaults(
        intermediate_size=14336, max_positions=4096 * 32, num_kv_heads=8, sliding_window=4096
    ),
    "qwen2": DecoderDefaults(
        intermediate_size=22016,
        max_positions=32768,
        vocab_size=151936,
        num_kv_heads=32,
        qkv_bias=True,
    ),
}
TEXT_FAMILIES = (*DECODERS, "mpt")
_LARGEST_BASE = 1e15  # of rotary positions: what float32 still counts with

ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


def parse_activation(reader: KeyReader, key: str, default: str) -> Activation:
    """The activation function that a key names.

    Raises:
        UnsupportedModelError: lapilli does not have it.
    """
    name = reader.text(key) or default
    if name not in ACTIVATIONS:
        raise UnsupportedModelError(
            f"{reader.where}: {reader.prefix}{key} is {name!r}, "
            f"choose from {', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[name]


def parse_text(reader: KeyReader, family: str, *, tied: bool | None = None) -> TextConfig:
    """The language model that the reader's keys describe.

    Args:
        reader: keys of a plain config.json, of a LLaVA config.json or of a `text_config`.
        family: one of TEXT_FAMILIES.
        tied: whether the output layer is the embedding, when the caller knows better than the file.

    Raises:
        ConfigError: a key is missing or of the wrong type.
        UnsupportedModelError: the family, or a variation of it, is not one of ours.
    """
    if family == "mpt":
        return parse_mpt(reader)
    if family not in DECODERS:
        raise UnsupportedModelError(
            f"{reader.where}: language model type {family!r} is not supported, "
            f"choose from {', '.join(TEXT_FAMILIES)}"
        )
    return parse_decoder(reader, family, tied=tied)


def parse_decoder(reader: KeyReader, family: str, *, tied: bool | None = None) -> DecoderConfig:
    """A Llama-shaped decoder."""
    defaults = DECODERS[family]
    hidden_size = reader.positive("hidden_size", 4096, most=MOST_WIDTH)
    num_heads = reader.positive("num_attention_heads", 32, most=MOST_HEADS)
    max_positions = reader.positive(
        "max_position_embeddings", defaults.max_positions, most=MOST_POSITIONS
    )
    head_dim = reader.optional_positive("head_dim", most=MOST_WIDTH)
    if head_dim is None and hidden_size % num_heads:
        raise ConfigError(
            f"{reader.where}: hidden_size {hidden_size} is not a multiple of "
            f"num_attention_heads {num_heads}"
        )
    theta, scaling = parse_rope(reader, max_positions)
    says_tied = reader.flag("tie_word_embeddings", False)
    attention_bias = reader.flag("attention_bias", False)
    num_layers = reader.positive("num_hidden_layers", 32, most=MOST_LAYERS)
    return DecoderConfig(
        family=family,
        vocab_size=reader.positive("vocab_size", defaults.vocab_size, most=MOST_WORDS),
        hidden_size=hidden_size,
        intermediate_size=reader.positive(
            "intermediate_size", defaults.intermediate_size, most=MOST_WIDTH
        ),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=_num_kv_heads(reader, defaults, num_heads),
        head_dim=head_dim or hidden_size // num_heads,
        norm_eps=reader.number("rms_norm_eps", 1e-6, least=0.0, most=1.0),
        rope_theta=theta,
        rope_scaling=scaling,
        max_positions=max_positions,
        sliding_window=_sliding_window(reader, family, num_layers),
        qkv_bias=defaults.qkv_bias or attention_bias,
        output_bias=attention_bias,
        mlp_bias=reader.flag("mlp_bias", False),
        activation=parse_activation(reader, "hidden_act", "silu"),
        tie_embeddings=says_tied if tied is None else tied,
    )


def _num_kv_heads(reader: KeyReader, defaults: DecoderDefaults, num_heads: int) -> int:
    # An explicit null means "as many as query heads"; only an absent key takes the default.
    if reader.has("num_key_value_heads") or defaults.num_kv_heads is None:
        return reader.optional_positive("num_key_value_heads", most=MOST_HEADS) or num_heads
    return defaults.num_kv_heads


def _sliding_window(reader: KeyReader, family: str, num_layers: int) -> int | None:
    """Positions that a token sees; None: all before it."""
    defaults = DECODERS[family]
    window = reader.optional_positive("sliding_window")
    if family == "mistral":
        return window if reader.has("sliding_window") else defaults.sliding_window
    if family != "qwen2" or not reader.flag("use_sliding_window", False):
        return None
    first = reader.integer("max_window_layers", 28)
    if first >= num_layers:
        return None
    if first > 0:
        raise UnsupportedModelError(
            f"{reader.where}: max_window_layers {first} of {num_layers} layers: a sliding window "
            "in a part of the layers is not supported"
        )
    return window if reader.has("sliding_window") else 4096


def parse_rope(reader: KeyReader, max_positions: int) -> tuple[float, RopeScaling | None]:
    """Base and scaling of the rotary positions, in any spelling of the last years.

    `rope_theta` + `rope_scaling: {type | rope_type, factor, ...}` before transformers 5,
    `rope_parameters: {rope_type, rope_theta, factor, ...}` since.
    """
    theta = reader.number("rope_theta", 10000.0, least=1.0, most=_LARGEST_BASE)
    newer, older = reader.child("rope_parameters"), reader.child("rope_scaling")
    rope = newer if newer.raw else older
    theta = rope.number("rope_theta", theta, least=1.0, most=_LARGEST_BASE)
    partial = rope.number("partial_rotary_factor", reader.number("partial_rotary_factor", 1.0))
    if partial != 1.0:
        raise UnsupportedModelError(
            f"{reader.where}: partial_rotary_factor {partial} is not supported, expected 1.0"
        )
    kind = rope.text("rope_type") or rope.text("type") or "default"
    if kind == "default":
        return theta, None
    return theta, _rope_scaling(rope, kind, max_positions)


def _rope_scaling(rope: KeyReader, kind: str, max_positions: int) -> RopeScaling:
    kinds: dict[str, Literal["linear", "dynamic", "llama3"]] = {
        "linear": "linear",
        "dynamic": "dynamic",
        "llama3": "llama3",
    }
    if kind not in kinds:
        raise UnsupportedModelError(
            f"{rope.where}: {rope.prefix}rope_type {kind!r} is not supported, "
            f"choose from default, {', '.join(kinds)}"
        )
    factor = rope.optional_number("factor", least=1.0, most=_LARGEST_BASE)
    if factor is None:
        raise ConfigError(f"{rope.where}: {rope.prefix}factor must be a number, got None")
    low = rope.number("low_freq_factor", 1.0, least=0.0, most=_LARGEST_BASE)
    high = rope.number("high_freq_factor", 4.0, least=0.0, most=_LARGEST_BASE)
    if kind == "llama3" and high <= low:
        raise ConfigError(
            f"{rope.where}: {rope.prefix}high_freq_factor {high:g} must be larger than "
            f"low_freq_factor {low:g}"
        )
    return RopeScaling(
        kind=kinds[kind],
        factor=factor,
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_positions=rope.positive(
            "original_max_position_embeddings", max_positions, most=MOST_POSITIONS
        ),
    )


def parse_mpt(reader: KeyReader) -> MptConfig:
    """MosaicML's MPT, with ALiBi.

    Raises:
        UnsupportedModelError: a variation of it without published LLaVA checkpoint.
    """
    attention = reader.child("attn_config", ignored.MPT_ATTENTION)
    for source, key, only in (
        (attention, "alibi", True),
        (attention, "qk_ln", False),
        (attention, "prefix_lm", False),
        (reader, "no_bias", True),
    ):
        if source.flag(key, only) is not only:
            raise UnsupportedModelError(
                f"{reader.where}: {source.prefix}{key} {not only} is not supported, expected {only}"
            )
    kind = attention.text("attn_type", "multihead_attention")
    if kind != "multihead_attention":
        raise UnsupportedModelError(
            f"{reader.where}: attn_type {kind!r} is not supported, expected 'multihead_attention'"
        )
    if reader.value("logit_scale") is not None:
        raise UnsupportedModelError(f"{reader.where}: logit_scale is not supported, expected null")
    width, layers, heads = (
        reader.positive(_either(reader, own, usual), default, most=most)
        for own, usual, default, most in (
            ("d_model", "hidden_size", 2048, MOST_WIDTH),
            ("n_layers", "num_hidden_layers", 24, MOST_LAYERS),
            ("n_heads", "num_attention_heads", 16, MOST_HEADS),
        )
    )
    if width % heads:
        raise ConfigError(f"{reader.where}: d_model {width} is not a multiple of n_heads {heads}")
    return MptConfig(
        vocab_size=reader.positive("vocab_size", 50368, most=MOST_WORDS),
        hidden_size=width,
        num_layers=layers,
        num_heads=heads,
        max_positions=reader.positive("max_seq_len", 2048, most=MOST_POSITIONS),
        expansion_ratio=reader.positive("expansion_ratio", 4, most=64),
        norm_eps=reader.number("layer_norm_epsilon", 1e-5, least=0.0, most=1.0),
        alibi_bias_max=attention.positive("alibi_bias_max", 8, most=1000),
        clip_qkv=attention.optional_number("clip_qkv", least=0.0),
        softmax_scale=attention.optional_number("softmax_scale"),
        tie_embeddings=reader.flag("tie_word_embeddings", True),
    )


def _either(reader: KeyReader, first: str, second: str) -> str:
    return first if reader.has(first) or not reader.has(second) else second
