import json

import pytest

from lapilli.config.huggingface import parse_config
from lapilli.config.llava import named_tower
from lapilli.config.model import DecoderConfig, MptConfig
from lapilli.errors import CheckpointError, ConfigError, UnknownKeyError, UnsupportedModelError
from lapilli.geometry import ImageSize

CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 56,
    "patch_size": 14,
}
PREPROCESSOR = {
    "crop_size": 56,
    "do_center_crop": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": [0.1, 0.2, 0.3],
    "image_std": [0.4, 0.5, 0.6],
    "resample": 3,
    "size": 56,
}


def original(**changes):
    raw = {
        "model_type": "llava_llama",
        "architectures": ["LlavaLlamaForCausalLM"],
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "vocab_size": 1000,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "torch_dtype": "float16",
        "mm_vision_tower": "openai/clip",
        "mm_hidden_size": 32,
        "mm_vision_select_layer": -2,
        "mm_projector_type": "mlp2x_gelu",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    raw.update(changes)
    return {key: value for key, value in raw.items() if value != "absent"}


def parse(raw, **files):
    return parse_config(raw, **{"tower": CLIP, "preprocessor": PREPROCESSOR, **files})


def test_original_with_defaults_of_absent_keys():
    config, report = parse(original())
    assert isinstance(config.text, DecoderConfig)
    assert config.text.num_kv_heads == 4
    assert config.text.head_dim == 16
    assert config.text.rope_theta == 10000.0
    assert config.layout == "llava"
    assert config.torch_dtype == "float16"
    assert config.vision.feature_layer == -2
    assert config.vision.feature_select == "patch"
    assert config.vision.activation == "quick_gelu"
    assert (config.projector.kind, config.projector.depth) == ("mlp", 2)
    assert (config.image.aspect, config.image.merge) == ("square", "flat")
    assert config.image.pixels.crop_size == ImageSize(56, 56)
    assert config.image.pixels.shortest_edge == 56
    assert config.image.pixels.mean == (0.1, 0.2, 0.3)
    assert config.tokens.use_patch_token
    assert not config.tokens.use_start_end
    assert (config.tokens.bos_id, config.tokens.eos_ids, config.tokens.pad_id) == (1, (2,), 0)
    assert config.context_length == 2048
    assert config.padding_side == "right"
    assert config.max_length is None
    assert not config.has_newline
    assert report.unknown == ()


@pytest.mark.parametrize(
    ("kind", "architecture", "family"),
    [
        ("llava_llama", "LlavaLlamaForCausalLM", "llama"),
        ("llava_mistral", "LlavaMistralForCausalLM", "mistral"),
        ("llava", "LlavaLlamaForCausalLM", "llama"),
        ("llava", "LlavaMistralForCausalLM", "mistral"),
    ],
)
def test_backbone_comes_from_model_type_or_architecture(kind, architecture, family):
    config, _ = parse(
        original(model_type=kind, architectures=[architecture], num_attention_heads=8)
    )
    assert config.text.family == family


def test_mpt():
    raw = {
        "model_type": "llava_mpt",
        "d_model": 64,
        "n_heads": 4,
        "n_layers": 3,
        "max_seq_len": 2048,
        "vocab_size": 902,
        "no_bias": True,
        "norm_type": "low_precision_layernorm",
        "attn_config": {"alibi": True, "alibi_bias_max": 8, "attn_impl": "torch", "qk_ln": False},
        "mm_vision_tower": "clip",
        "mm_hidden_size": 32,
        "mm_vision_select_layer": -2,
    }
    config, report = parse(raw)
    assert config.text == MptConfig(
        vocab_size=902, hidden_size=64, num_layers=3, num_heads=4, max_positions=2048
    )
    assert config.projector.kind == "linear"
    assert "attn_config.attn_impl" in report.ignored
    assert "attn_config.alibi" in report.used
    assert report.unknown == ()
    with pytest.raises(UnsupportedModelError, match=r"attn_config.alibi False is not supported"):
        parse({**raw, "attn_config": {"alibi": False}})


@pytest.mark.parametrize("literal", [False, True])
def test_pinpoints_are_width_first_in_the_original(literal):
    points = [[56, 112], [112, 56]]
    config, _ = parse(
        original(
            image_aspect_ratio="anyres",
            mm_patch_merge_type="spatial_unpad",
            image_grid_pinpoints=json.dumps(points) if literal else points,
        )
    )
    assert config.image.pinpoints == (ImageSize(112, 56), ImageSize(56, 112))
    assert config.has_newline
    assert not config.image.rounds_unpad


def test_mistral_keeps_its_window_default_and_an_explicit_null():
    raw = original(model_type="llava_mistral", num_attention_heads=8)
    assert parse(raw)[0].text.sliding_window == 4096
    assert parse({**raw, "sliding_window": None})[0].text.sliding_window is None


@pytest.mark.parametrize(
    ("keys", "kind", "factor", "theta"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear", 2.0, 10000.0),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 3}}, "dynamic", 3.0, 10000.0),
        (
            {"rope_parameters": {"rope_type": "llama3", "factor": 8, "rope_theta": 5e5}},
            "llama3",
            8.0,
            5e5,
        ),
    ],
)
def test_rope_scaling_in_every_spelling(keys, kind, factor, theta):
    text = parse(original(**keys))[0].text
    assert (text.rope_scaling.kind, text.rope_scaling.factor, text.rope_theta) == (
        kind,
        factor,
        theta,
    )


def test_rope_parameters_of_transformers_5_without_scaling():
    text = parse(original(rope_parameters={"rope_type": "default", "rope_theta": 1e6}))[0].text
    assert text.rope_scaling is None
    assert text.rope_theta == 1e6


def test_every_key_is_used_ignored_or_unknown():
    raw = original(mm_projector_lr=2e-5, use_mm_proj=True, mm_new_thing=3)
    _, report = parse(raw)
    assert report.unknown == ("mm_new_thing",)
    assert {"mm_projector_lr", "use_mm_proj"} <= set(report.ignored)
    assert set(raw) <= {*report.used, *report.ignored, *report.unknown}
    with pytest.raises(UnknownKeyError, match="unknown configuration key mm_new_thing"):
        report.refuse_unknown()


def test_generation_config_wins_over_config():
    config, _ = parse(original(), generation={"eos_token_id": [2, 7], "pad_token_id": 5})
    assert config.tokens.eos_ids == (2, 7)
    assert config.tokens.pad_id == 5


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"model_type": "blip"}, UnsupportedModelError, r"model_type 'blip' .* llava_mistral"),
        ({"mm_vision_select_layer": "absent"}, ConfigError, "mm_vision_select_layer is missing"),
        ({"mm_vision_select_layer": -9}, ConfigError, r"feature layer -9 does not exist.* 4 lay"),
        ({"mm_vision_select_feature": "cls"}, ConfigError, r"'cls', choose from patch, cls_patch"),
        ({"mm_projector_type": "qformer"}, UnsupportedModelError, r"'qformer' .*mlpNx_gelu"),
        ({"mm_projector_type": "identity"}, ConfigError, r"tower has width 32 .* model 64"),
        ({"mm_hidden_size": 48}, ConfigError, r"mm_hidden_size is 48, but .* hidden_size 32"),
        ({"mm_patch_merge_type": "max"}, UnsupportedModelError, "'max' is not supported"),
        ({"image_grid_pinpoints": "[[1,"}, ConfigError, "image_grid_pinpoints is not a list"),
        ({"image_grid_pinpoints": [[1, 2, 3]]}, ConfigError, r"list of pairs .* got \[1, 2, 3\]"),
        ({"hidden_size": "big"}, ConfigError, "hidden_size must be a whole number, got 'big'"),
        ({"num_hidden_layers": 0}, ConfigError, "num_hidden_layers must be .* at least 1, got 0"),
        (
            {"num_key_value_heads": 3},
            ConfigError,
            "num_attention_heads 4 is not a multiple of num_key",
        ),
        ({"hidden_size": 66}, ConfigError, "66 is not a multiple of num_attention_heads 4"),
        ({"hidden_act": "tanh"}, UnsupportedModelError, "hidden_act is 'tanh', choose from"),
        ({"rope_scaling": {"type": "yarn", "factor": 2}}, UnsupportedModelError, "'yarn'"),
        ({"rope_scaling": {"type": "linear"}}, ConfigError, "rope_scaling.factor must be"),
        ({"s2": True}, UnsupportedModelError, "s2 is true"),
        ({"tokenizer_padding_side": "up"}, ConfigError, "'up', choose from left, right"),
        ({"mm_use_im_start_end": "yes"}, ConfigError, "must be true or false, got 'yes'"),
    ],
)
def test_what_cannot_be_followed_is_named(changes, error, match):
    with pytest.raises(error, match=match):
        parse(original(**changes))


def test_two_tower_file_with_repeated_section():
    tower = {
        "model_type": "clip",
        "text_config": {"hidden_size": 24},
        "vision_config": {**CLIP, "image_size": 224},
        "vision_config_dict": {"image_size": 56},
        "projection_dim": 16,
    }
    assert parse(original(), tower=tower)[0].vision.image_size == 56


def test_tiles_that_do_not_fit_the_tower():
    with pytest.raises(ConfigError, match=r"tiles of 112x112 do not fit .* expects 56x56"):
        parse(original(), preprocessor={**PREPROCESSOR, "crop_size": 112})


def test_unknown_tower_type():
    with pytest.raises(UnsupportedModelError, match=r"tower type 'vit' .* siglip_vision_model"):
        parse(original(), tower={**CLIP, "model_type": "vit"})


def test_without_tower_there_are_no_images():
    config, _ = parse_config(original(mm_vision_tower="absent"))
    assert config.vision is None
    assert config.projector is None
    assert named_tower(original(mm_vision_tower="absent")) is None
    assert named_tower(original()) == "openai/clip"


def test_siglip_tower_of_the_original_layout():
    tower = {"model_type": "siglip_vision_model", **{k: CLIP[k] for k in list(CLIP)[1:]}}
    pixels = {
        "image_processor_type": "SiglipImageProcessor",
        "size": {"height": 56, "width": 56},
        "image_mean": [0.5, 0.5, 0.5],
    }
    config, _ = parse(original(), tower=tower, preprocessor=pixels)
    assert config.vision.family == "siglip"
    assert config.vision.norm_eps == 1e-6
    assert config.vision.activation == "gelu_tanh"
    assert config.image.pixels.resize_to == ImageSize(56, 56)
    assert not config.image.pixels.do_center_crop
    assert config.image.pixels.std == (0.5, 0.5, 0.5)


def test_hf_llava_means_its_defaults_when_keys_are_absent():
    raw = {"model_type": "llava", "text_config": {"model_type": "mistral"}, "vision_config": {}}
    config, report = parse_config(raw)
    assert config.layout == "hf_llava"
    assert config.text.intermediate_size == 14336
    assert config.text.num_kv_heads == 8
    assert config.text.max_positions == 131072
    assert (config.vision.image_size, config.vision.patch_size) == (336, 14)
    assert config.vision.num_patches == 576
    assert config.tokens.image_id == 32000
    assert (config.projector.depth, config.projector.activation) == (2, "gelu")
    assert config.image.aspect == "square"
    assert config.vision_in_checkpoint
    assert report.unknown == ()


def test_hf_llava_next():
    raw = {
        "model_type": "llava_next",
        "text_config": {"model_type": "qwen2", "num_hidden_layers": 2, "hidden_size": 64},
        "vision_config": CLIP,
        "image_grid_pinpoints": [[56, 112], [112, 56]],
        "vision_feature_select_strategy": "full",
        "vision_feature_layer": [-1],
        "image_token_id": 7,
        "multimodal_projector_bias": False,
    }
    config, _ = parse_config(raw)
    assert config.layout == "hf_llava_next"
    assert config.text.qkv_bias
    assert not config.text.output_bias
    assert config.image.pinpoints == (ImageSize(56, 112), ImageSize(112, 56))
    assert config.image.rounds_unpad
    assert config.has_newline
    assert config.vision.feature_select == "cls_patch"
    assert config.vision.feature_layer == -1
    assert config.tokens.image_id == 7
    assert not config.projector.bias
    with pytest.raises(UnsupportedModelError, match="takes 2 layers, only one is supported"):
        parse_config({**raw, "vision_feature_layer": [-1, -2]})


@pytest.mark.parametrize(
    ("kind", "outer", "inner", "head", "tied"),
    [
        ("llava", True, False, True, True),
        ("llava", False, True, False, True),
        ("llava_next", False, True, True, False),
        ("llava_next", False, True, False, True),
        ("llava", False, False, True, False),
    ],
)
def test_hf_tied_embeddings(kind, outer, inner, head, tied):
    raw = {
        "model_type": kind,
        "text_config": {"model_type": "llama", "tie_word_embeddings": inner},
        "vision_config": {},
        "tie_word_embeddings": outer,
    }
    names = frozenset({"language_model.lm_head.weight"} if head else set())
    assert parse_config(raw, weight_names=names)[0].text.tie_embeddings is tied


def test_plain_language_model():
    raw = {"model_type": "qwen2", "hidden_size": 64, "eos_token_id": [3, 4], "dtype": "bfloat16"}
    config, report = parse_config(raw)
    assert config.layout == "text"
    assert config.vision is None
    assert config.text.vocab_size == 151936
    assert config.tokens.eos_ids == (3, 4)
    assert config.torch_dtype == "bfloat16"
    assert report.unknown == ()


@pytest.mark.parametrize(("first", "window"), [(0, 512), (9, 512), (28, None), (40, None)])
def test_qwen2_window_in_all_some_or_no_layers(first, window):
    raw = {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 512}
    raw.update(num_hidden_layers=28, max_window_layers=first)
    text = parse_config(raw)[0].text
    assert text.sliding_window == window
    assert text.full_layers == (tuple(range(first)) if window else ())


HUGE = [
    *(("num_hidden_layers", value) for value in (10**9, 1001, -1, 0, float("nan"), 2.5)),
    *(("hidden_size", value) for value in (10**9, -64, float("inf"), 10**4000, True, [64])),
    *(("max_position_embeddings", value) for value in (10**9, 0, float("-inf"), "many")),
    *(("vocab_size", value) for value in (10**9, -1)),
    *(("intermediate_size", value) for value in (10**9, 10**300)),
    *(("num_attention_heads", value) for value in (10**9, 0)),
    *(("num_key_value_heads", value) for value in (-4, 10**9, float("nan"))),
    *(("head_dim", value) for value in (-16, 10**9)),
    *(("sliding_window", value) for value in (-1, 0, float("nan"))),
    *(("rms_norm_eps", value) for value in (float("nan"), -1, 2, 10**400, "1e-5")),
    *(("rope_theta", value) for value in (float("nan"), float("inf"), 0, -1, 1e300)),
    *(("rope_scaling", {"type": "linear", "factor": value}) for value in (float("nan"), 0, 1e300)),
    ("rope_scaling", {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4}),
    ("rope_scaling", {"type": "dynamic", "factor": 2, "original_max_position_embeddings": -1}),
    *(("bos_token_id", value) for value in (float("nan"), 10**30, [None], "1", [True])),
    *(("mm_vision_select_layer", value) for value in (float("nan"), 10**30, 10**9)),
    *(("mm_projector_type", value) for value in ("mlp1000000000x_gelu", "resampler" + "9" * 5000)),
    ("mm_projector_type", "x" * 100_000),
    *(("image_grid_pinpoints", value) for value in ("[" * 5000, "9" * 20_000, [[10**9, 10**9]])),
    *(("image_grid_pinpoints", value) for value in ([[336, 336]] * 5000, [[True, 336]])),
    *(("tokenizer_model_max_length", value) for value in (-1, float("nan"), "x")),
    *(("max_sequence_length", value) for value in (10**9, -1)),
    ("model_type", ["llava_llama"]),
    ("model_type", "x" * 100_000),
]


@pytest.mark.parametrize(("key", "value"), HUGE)
def test_a_value_beyond_every_model_is_the_files_fault(key, value):
    with pytest.raises(CheckpointError) as caught:
        parse(original(**{key: value}))
    assert len(str(caught.value)) < 600
    assert "\n" not in str(caught.value)


TOWER = [
    *(("image_size", value) for value in (10**9, 8193, 7, float("nan"))),
    *(("patch_size", value) for value in (10**9, 0, -14)),
    *(("num_hidden_layers", value) for value in (10**9, -1)),
    *(("num_attention_heads", value) for value in (10**9, 3)),
    *(("hidden_size", value) for value in (10**9, float("nan"))),
    *(("layer_norm_eps", value) for value in (float("nan"), -1)),
    ("num_channels", 4),
]


@pytest.mark.parametrize(("key", "value"), TOWER)
def test_the_same_of_a_tower(key, value):
    with pytest.raises(CheckpointError):
        parse(original(), tower={**CLIP, key: value})


PIXELS = [
    *(("image_std", value) for value in ([0, 0.5, 0.5], [float("nan")] * 3, [[1]] * 3, ["1"] * 3)),
    *(("image_mean", value) for value in ([float("inf")] * 3, [10**400] * 3, 0.5)),
    *(("rescale_factor", value) for value in (float("nan"), 1e300, "1/255")),
    *(("size", value) for value in (10**9, -1, {"shortest_edge": 10**9}, ["a", "b"], [10**9, 1])),
    *(("resample", value) for value in (6, -1, float("nan"))),
]


@pytest.mark.parametrize(("key", "value"), PIXELS)
def test_the_same_of_a_preprocessor(key, value):
    with pytest.raises(CheckpointError):
        parse(original(), preprocessor={**PREPROCESSOR, key: value})


def test_no_limit_is_no_number_of_tokens():
    config, _ = parse(original(tokenizer_model_max_length=10**30, eos_token_id=[2, -1]))
    assert config.max_length is None
    assert config.tokens.eos_ids == (2,)
