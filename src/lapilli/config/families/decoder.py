"""The families of Llama-shaped decoders: config.json -> DecoderConfig and back.

A family is a row of what it means when its file leaves a key out, and of what its layers have that
Llama's do not. Defaults are those of the transformers library, which leaves default values out of
its files.
"""

from dataclasses import dataclass, fields
from typing import Literal

from lapilli.config.families import Family
from lapilli.config.model import Activation, DecoderConfig, RopeScaling, TextConfig
from lapilli.config.reader import (
    MOST_HEADS,
    MOST_LAYERS,
    MOST_POSITIONS,
    MOST_WIDTH,
    MOST_WORDS,
    KeyReader,
    shown,
)
from lapilli.errors import ConfigError, UnsupportedModelError

_LARGEST_BASE = 1e15  # of rotary positions: what float32 still counts with
_LARGEST_CAP = 1e6  # of scores and logits

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


# How transformers spells the activations that have several names.
ACTIVATION_NAMES: dict[Activation, str] = {
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
}


def parse_activation(reader: KeyReader, key: str, default: str) -> Activation:
    """Return the activation function that a key names.

    Raises:
        UnsupportedModelError: lapilli does not have it.
    """
    return reader.choice(key, default, ACTIVATIONS, UnsupportedModelError)


@dataclass(frozen=True, kw_only=True)
class DecoderFamily(Family):
    """A family whose model is a DecoderConfig.

    Attributes:
        vocab_size: default of the key of the same name, as the other sizes.
        head_dim: None: hidden_size / num_attention_heads.
        activation: of the MLP, as transformers spells it, under `activation_key`.
        tied: whether the output layer is the embedding.
        windows: which layers have the sliding window: none, all, those that max_window_layers says
            once use_sliding_window is true ("switched"), or all but every nth ("every"). In the
            last two cases `layer_types` comes first where it is written.
        full_every: n, the number of the layers that see everything.
        full_every_key: the key that says n, if there is one.
        local_rope_theta: base of the rotary positions in layers with a window, where it is another.
        qkv_bias: queries, keys and values have a bias, whatever attention_bias says.
        query_scalar: default of query_pre_attn_scalar, if the family has it.
        softcaps: defaults of attn_logit_softcapping and final_logit_softcapping, likewise.
        scales_embedding: vectors of tokens are multiplied by the square root of their width.

    The other fields are those of DecoderConfig.
    """

    intermediate_size: int
    max_positions: int
    vocab_size: int = 32000
    hidden_size: int = 4096
    num_layers: int = 32
    num_heads: int = 32
    num_kv_heads: int | None = None
    head_dim: int | None = None
    activation: str = "silu"
    activation_key: str = "hidden_act"
    tied: bool = False
    windows: Literal["none", "all", "switched", "every"] = "none"
    sliding_window: int | None = None
    full_every: int = 1
    full_every_key: str | None = None
    rope_theta: float = 10000.0
    local_rope_theta: float | None = None
    qkv_bias: bool = False
    qk_norm: bool = False
    norm_offset: float = 0.0
    post_norms: bool = False
    query_scalar: int | None = None
    softcaps: tuple[float | None, float | None] | None = None
    scales_embedding: bool = False

    def is_tied(self, reader: KeyReader) -> bool:
        """Return whether the keys say that the output layer is the embedding."""
        return reader.flag("tie_word_embeddings", self.tied)

    def parse(self, reader: KeyReader, *, tied: bool | None = None) -> DecoderConfig:
        """Return the model; see Family.parse."""
        if reader.flag("use_bidirectional_attention", False):
            raise UnsupportedModelError(
                f"{reader.where}: {reader.prefix}use_bidirectional_attention true is not supported"
            )
        hidden_size = reader.positive("hidden_size", self.hidden_size, most=MOST_WIDTH)
        num_heads = reader.positive("num_attention_heads", self.num_heads, most=MOST_HEADS)
        num_layers = reader.positive("num_hidden_layers", self.num_layers, most=MOST_LAYERS)
        max_positions = reader.positive(
            "max_position_embeddings", self.max_positions, most=MOST_POSITIONS
        )
        says_tied, attention_bias = self.is_tied(reader), reader.flag("attention_bias", False)
        theta, scaling, local_theta = self._rope(reader, max_positions)
        window, full_layers = self._windows(reader, num_layers)
        cap, logit_cap = self._softcaps(reader)
        return DecoderConfig(
            family=self.model_type,
            vocab_size=reader.positive("vocab_size", self.vocab_size, most=MOST_WORDS),
            hidden_size=hidden_size,
            intermediate_size=reader.positive(
                "intermediate_size", self.intermediate_size, most=MOST_WIDTH
            ),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=self._num_kv_heads(reader, num_heads),
            head_dim=self._head_dim(reader, hidden_size, num_heads),
            norm_eps=reader.number("rms_norm_eps", 1e-6, least=0.0, most=1.0),
            rope_theta=theta,
            rope_scaling=scaling,
            local_rope_theta=local_theta,
            max_positions=max_positions,
            sliding_window=window,
            full_layers=full_layers,
            qkv_bias=self.qkv_bias or attention_bias,
            output_bias=attention_bias,
            mlp_bias=reader.flag("mlp_bias", False),
            qk_norm=self.qk_norm,
            norm_offset=self.norm_offset,
            post_norms=self.post_norms,
            query_scalar=self._query_scalar(reader),
            attention_softcap=cap,
            logit_softcap=logit_cap,
            embedding_scale=hidden_size**0.5 if self.scales_embedding else 1.0,
            activation=parse_activation(reader, self.activation_key, self.activation),
            tie_embeddings=says_tied if tied is None else tied,
        )

    def _num_kv_heads(self, reader: KeyReader, num_heads: int) -> int:
        # An explicit null means "as many as query heads"; only an absent key takes the default.
        if reader.has("num_key_value_heads") or self.num_kv_heads is None:
            return reader.optional_positive("num_key_value_heads", most=MOST_HEADS) or num_heads
        return self.num_kv_heads

    def _head_dim(self, reader: KeyReader, hidden_size: int, num_heads: int) -> int:
        found = reader.optional_positive("head_dim", most=MOST_WIDTH)
        if found is None and not reader.has("head_dim"):
            found = self.head_dim
        if found is None and hidden_size % num_heads:
            raise ConfigError(
                f"{reader.where}: hidden_size {hidden_size} is not a multiple of "
                f"num_attention_heads {num_heads}"
            )
        return found or hidden_size // num_heads

    def _query_scalar(self, reader: KeyReader) -> float | None:
        if self.query_scalar is None:
            return None
        default = float(self.query_scalar)
        return reader.number("query_pre_attn_scalar", default, least=1e-3, most=float(MOST_WIDTH))

    def _softcaps(self, reader: KeyReader) -> tuple[float | None, float | None]:
        """Return the caps of scores and of logits; an explicit null means that there is none."""
        if self.softcaps is None:
            return None, None
        keys = ("attn_logit_softcapping", "final_logit_softcapping")
        found = [reader.optional_number(key, least=1e-3, most=_LARGEST_CAP) for key in keys]
        attention, logits = (
            value if reader.has(key) else default
            for key, value, default in zip(keys, found, self.softcaps, strict=True)
        )
        return attention, logits

    def _windows(self, reader: KeyReader, num_layers: int) -> tuple[int | None, tuple[int, ...]]:
        """Return the sliding window and the layers that do not have it."""
        window = reader.optional_positive("sliding_window")
        if self.windows == "none":
            return None, ()
        if not reader.has("sliding_window"):
            window = self.sliding_window
        if self.windows == "all":
            return window, ()
        if self.windows == "switched" and not reader.flag("use_sliding_window", False):
            return None, ()
        full = self._full_layers(reader, num_layers)
        # Local layers can have positions of their own; else layers are alike without a window.
        if self.local_rope_theta is None and (window is None or len(full) == num_layers):
            return None, ()
        return window, full

    def _full_layers(self, reader: KeyReader, num_layers: int) -> tuple[int, ...]:
        first = reader.integer("max_window_layers", 28) if self.windows == "switched" else 0
        every = self.full_every
        if self.full_every_key is not None:
            every = reader.positive(self.full_every_key, every, most=MOST_LAYERS)
        kinds = reader.value("layer_types")
        if kinds is not None:
            return _full_of_types(reader, kinds, num_layers)
        if self.windows == "switched":
            return tuple(range(min(max(first, 0), num_layers)))
        return tuple(layer for layer in range(num_layers) if (layer + 1) % every == 0)

    def _rope(
        self, reader: KeyReader, max_positions: int
    ) -> tuple[float, RopeScaling | None, float | None]:
        """Return base and scaling of the rotary positions, and the base in local layers.

        `rope_theta` + `rope_scaling: {type | rope_type, factor, ...}` before transformers 5,
        `rope_parameters: {rope_type, rope_theta, factor, ...}` since.
        """
        theta = reader.number("rope_theta", self.rope_theta, least=1.0, most=_LARGEST_BASE)
        newer, older = reader.child("rope_parameters"), reader.child("rope_scaling")
        if self.local_rope_theta is None:
            rope = newer if newer.raw else older
            return *_rope(reader, rope, theta, max_positions), None
        local = reader.number(
            "rope_local_base_freq", self.local_rope_theta, least=1.0, most=_LARGEST_BASE
        )
        full = newer.child("full_attention") if newer.raw.get("full_attention") else older
        theta, scaling = _rope(reader, full, theta, max_positions)
        local, other = _rope(reader, newer.child("sliding_attention"), local, max_positions)
        if other is not None:
            raise UnsupportedModelError(
                f"{reader.where}: rope_parameters.sliding_attention with rope_type {other.kind!r} "
                "is not supported, expected default"
            )
        return theta, scaling, local

    def write(self, text: TextConfig) -> dict[str, object]:
        """Return the keys of a model; what comes back from them is the model itself.

        Raises:
            UnsupportedModelError: something about it that the family has no key for.
        """
        if not isinstance(text, DecoderConfig):
            raise UnsupportedModelError(f"a {type(text).__name__} is no {self.model_type} model")
        written = self._keys(text)
        read = self.parse(KeyReader(written, "config.json"))
        # Of a scaling only what its kind reads is written.
        lost = [
            field.name
            for field in fields(text)
            if field.name != "rope_scaling"
            and getattr(read, field.name) != getattr(text, field.name)
        ]
        if lost:
            raise UnsupportedModelError(
                f"config.json of a {self.model_type} model has no key for "
                + ", ".join(f"{name} {getattr(text, name)!r}" for name in lost)
            )
        return written

    def _keys(self, text: DecoderConfig) -> dict[str, object]:
        written: dict[str, object] = {
            "vocab_size": text.vocab_size,
            "hidden_size": text.hidden_size,
            "intermediate_size": text.intermediate_size,
            "num_hidden_layers": text.num_layers,
            "num_attention_heads": text.num_heads,
            "num_key_value_heads": text.num_kv_heads,
            "head_dim": text.head_dim,
            self.activation_key: ACTIVATION_NAMES[text.activation],
            "rms_norm_eps": text.norm_eps,
            "rope_theta": text.rope_theta,
            "rope_scaling": _scaling_keys(text.rope_scaling),
            "max_position_embeddings": text.max_positions,
            "sliding_window": text.sliding_window,
            "attention_bias": text.output_bias,
            "mlp_bias": text.mlp_bias,
            "tie_word_embeddings": text.tie_embeddings,
        }
        has_kinds = text.sliding_window is not None or self.local_rope_theta is not None
        if self.windows in ("switched", "every") and has_kinds:
            written["layer_types"] = [
                "sliding_attention" if text.is_local(layer) else "full_attention"
                for layer in range(text.num_layers)
            ]
        if self.windows == "switched" and text.sliding_window is not None:
            first = next(i for i in range(text.num_layers) if text.is_local(i))
            written |= {"use_sliding_window": True, "max_window_layers": first}
        if self.local_rope_theta is not None:
            written["rope_local_base_freq"] = text.local_rope_theta
        if self.query_scalar is not None:
            scalar = text.query_scalar
            is_whole = scalar is not None and scalar == int(scalar)  # transformers takes no 256.0
            written["query_pre_attn_scalar"] = int(scalar or 0) if is_whole else scalar
        if self.softcaps is not None:
            written["attn_logit_softcapping"] = text.attention_softcap
            written["final_logit_softcapping"] = text.logit_softcap
        return written


def _full_of_types(reader: KeyReader, kinds: object, num_layers: int) -> tuple[int, ...]:
    """Return the layers that `layer_types` says to see everything."""
    known = ("full_attention", "sliding_attention")
    if not isinstance(kinds, list) or len(kinds) != num_layers:
        raise ConfigError(
            f"{reader.where}: {reader.prefix}layer_types must be a list of {num_layers} names, one "
            f"for every layer, got {shown(kinds)}"
        )
    other = next((kind for kind in kinds if kind not in known), None)
    if other is not None:
        raise UnsupportedModelError(
            f"{reader.where}: {reader.prefix}layer_types with {shown(other)} is not supported, "
            f"choose from {', '.join(known)}"
        )
    return tuple(layer for layer, kind in enumerate(kinds) if kind == "full_attention")


def _rope(
    reader: KeyReader, rope: KeyReader, theta: float, max_positions: int
) -> tuple[float, RopeScaling | None]:
    theta = rope.number("rope_theta", theta, least=1.0, most=_LARGEST_BASE)
    partial = rope.number("partial_rotary_factor", reader.number("partial_rotary_factor", 1.0))
    if partial != 1.0:
        raise UnsupportedModelError(
            f"{reader.where}: partial_rotary_factor {partial} is not supported, expected 1.0"
        )
    older = rope.text("type", "default")  # read in any case: files have both
    kind = rope.text("rope_type", older)
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


def _scaling_keys(scaling: RopeScaling | None) -> dict[str, object] | None:
    if scaling is None:
        return None
    written: dict[str, object] = {
        "type": scaling.kind,
        "rope_type": scaling.kind,
        "factor": scaling.factor,
    }
    if scaling.kind == "llama3":
        written |= {
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_positions,
        }
    return written
