"""MosaicML's MPT: ALiBi, one fused qkv, no biases; its layers are lm/mpt.py."""

from dataclasses import dataclass

from lapilli.config.families import IGNORED, LIBRARY_KEYS, SAMPLING_KEYS, Family, keys_of
from lapilli.config.model import MptConfig, TextConfig
from lapilli.config.reader import (
    MOST_HEADS,
    MOST_LAYERS,
    MOST_POSITIONS,
    MOST_WIDTH,
    MOST_WORDS,
    KeyReader,
)
from lapilli.errors import ConfigError, UnsupportedModelError

# The kernel and the normalisation type do not change the numbers that are computed.
_IGNORED = IGNORED | keys_of("""
    attn_cfg fc_type ffn_config init_config learned_pos_emb max_position_embeddings norm_type
    tokenizer_name verbose vocab_parallel
""")
_IGNORED_OF_ATTENTION = (
    LIBRARY_KEYS | SAMPLING_KEYS | keys_of("attn_impl attn_pdrop attn_uses_sequence_id")
)


@dataclass(frozen=True, kw_only=True)
class MptFamily(Family):
    """The family whose model is an MptConfig."""

    def is_tied(self, reader: KeyReader) -> bool:
        """Return whether the keys say that the output layer is the embedding."""
        return reader.flag("tie_word_embeddings", True)

    def parse(self, reader: KeyReader, *, tied: bool | None = None) -> MptConfig:
        """Return the model; see Family.parse.

        Raises:
            UnsupportedModelError: a variation of it without published LLaVA checkpoint.
        """
        attention = reader.child("attn_config", _IGNORED_OF_ATTENTION)
        _check_variation(reader, attention)
        width, layers, heads = (
            reader.positive(_either(reader, own, usual), default, most=most)
            for own, usual, default, most in (
                ("d_model", "hidden_size", 2048, MOST_WIDTH),
                ("n_layers", "num_hidden_layers", 24, MOST_LAYERS),
                ("n_heads", "num_attention_heads", 16, MOST_HEADS),
            )
        )
        if width % heads:
            raise ConfigError(
                f"{reader.where}: d_model {width} is not a multiple of n_heads {heads}"
            )
        says_tied = self.is_tied(reader)
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
            tie_embeddings=says_tied if tied is None else tied,
        )

    def write(self, text: TextConfig) -> dict[str, object]:
        """Return the keys of the model."""
        if not isinstance(text, MptConfig):
            raise UnsupportedModelError(f"a {type(text).__name__} is no {self.model_type} model")
        return {
            "vocab_size": text.vocab_size,
            "d_model": text.hidden_size,
            "n_layers": text.num_layers,
            "n_heads": text.num_heads,
            "max_seq_len": text.max_positions,
            "expansion_ratio": text.expansion_ratio,
            "layer_norm_epsilon": text.norm_eps,
            "no_bias": True,
            "tie_word_embeddings": text.tie_embeddings,
            "attn_config": {
                "alibi": True,
                "alibi_bias_max": text.alibi_bias_max,
                "attn_type": "multihead_attention",
                "clip_qkv": text.clip_qkv,
                "softmax_scale": text.softmax_scale,
            },
        }


def _check_variation(reader: KeyReader, attention: KeyReader) -> None:
    """Refuse what no published LLaVA checkpoint has."""
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


def _either(reader: KeyReader, first: str, second: str) -> str:
    return first if reader.has(first) or not reader.has(second) else second


FAMILY = MptFamily(
    model_type="mpt",
    original=("llava_mpt", "LlavaMptForCausalLM"),
    marks=("mpt",),
    template="mpt",
    template_first=True,
    stem="transformer",
    in_hf_llava=False,
    ignored=_IGNORED,
)
