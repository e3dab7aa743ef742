"""Makers of honest folders: each writes small random checkpoints that load without a complaint.

`folder/model` is what a user names; `folder/vision` and `folder/base` are the tower and the base
that it names. Libraries that take seconds to import are imported where they are needed.
"""

import importlib.util
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

GOLDEN = Path(__file__).parents[1] / "golden" / "conformance"
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1010,
}
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
IMAGE_ID = 1000
WIDE = {**TEXT, "hidden_size": 128, "intermediate_size": 256}

Maker = Callable[[Path], None]


def name_of(make: Maker) -> str:
    """The name of a maker: of the function, and of what it was given."""
    if isinstance(make, partial):
        return "-".join((make.func.__name__.strip("_"), *map(str, make.args)))
    return make.__name__


def original(variant: str) -> Maker:
    """The maker of a variant of the golden checkpoints: the original's layout."""
    return partial(_original, variant)


def _original(variant: str, folder: Path) -> None:
    spec_of = importlib.util.spec_from_file_location("maker", GOLDEN / "make_checkpoint.py")
    maker = importlib.util.module_from_spec(spec_of)
    spec_of.loader.exec_module(maker)
    spec = json.loads(next(GOLDEN.glob(f"cases/*/{variant}/spec.json")).read_text())
    spec["name"] = "model"
    spec["vision"] |= {"dir": "vision", "image_size": 56}
    if "base" in spec:
        spec["base"]["dir"] = "base"
    maker.build(spec, str(folder), None, str(GOLDEN / "assets"))
    if spec["kind"] == "projector":
        config = json.loads((folder / "model" / "config.json").read_text())
        _write(folder, "config.json", {**config, "_name_or_path": "base"})
    if (folder / "model" / "tokenizer.model").is_file():
        _write(folder, "added_tokens.json", {"<seen>": 1000, "<asked>": 1001})


def hf_llava(folder: Path) -> None:
    """Hugging Face's LLaVA 1.5 over a Llama, with the tokenizer that a tokenizer.model becomes."""
    _hf(folder, TEXT)
    from lapilli.prompt.tokenizer.fast import llama_tokenizer

    _finish(folder, llama_tokenizer(_assets("tokenizer.model").read_bytes()))
    _write(folder, "preprocessor_config.json", _PIXELS)


def hf_next(folder: Path) -> None:
    """Hugging Face's LLaVA-NeXT over a Mistral, with a unigram tokenizer and its normalizers."""
    _hf(folder, TEXT, is_next=True)
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("▁", -1.0)]
    pieces += [(chr(code), -3.0) for code in range(33, 127)]
    pieces += [(f"▁w{i}", -2.0 - i / 1000) for i in range(IMAGE_ID - len(pieces))]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Replace("``", '"'),
            normalizers.NFKD(),
            normalizers.StripAccents(),
            normalizers.Lowercase(),
            normalizers.Replace(_regex(" {2,}"), " "),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(_regex(r"\d{1,3}|\p{L}+"), "isolated"), pre_tokenizers.Metaspace()]
    )
    tokenizer.decoder = decoders.Metaspace()
    _finish(folder, tokenizer)
    _write(folder, "processor_config.json", {"image_processor": _PIXELS, "patch_size": 14})


def plain(kind: str) -> Maker:
    """The maker of a language model without images."""
    return partial(_plain, kind)


def _plain(kind: str, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config

    configs = {
        "llama": LlamaConfig(
            **TEXT,
            tie_word_embeddings=True,
            rope_scaling={
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 512,
            },
        ),
        "mistral": MistralConfig(**TEXT, sliding_window=16),
        "qwen2": Qwen2Config(**TEXT),
    }
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(configs[kind]).save_pretrained(folder / "model")
    from lapilli.prompt.tokenizer.fast import llama_tokenizer

    _finish(folder, llama_tokenizer(_assets("tokenizer.model").read_bytes()), image=False)


LANGUAGE_MODELS = tuple(plain(kind) for kind in ("llama", "mistral", "qwen2"))


def awq(folder: Path) -> None:
    """The same LLaVA 1.5, wide enough, its language model packed as AWQ has it."""
    _published(folder, "awq")


def gptq(folder: Path) -> None:
    """The same in GPTQ."""
    _published(folder, "gptq")


def packed(folder: Path) -> None:
    """An original LLaVA that `lapilli quantize` packed in 4 bits."""
    from lapilli.checkpoint.load import load_checkpoint
    from lapilli.checkpoint.write.llava import save_llava

    original("llava-tiny-linear-square")(folder / "float")
    loaded = load_checkpoint(folder / "float" / "model", device="cpu", quantization="int4")
    save_llava(
        folder / "model",
        loaded.model,
        loaded.config,
        tokenizer_path=loaded.tokenizer_path,
        quantization=loaded.quantization,
    )


def pebble(folder: Path) -> None:
    """The embedded model, which says which pictures it knows."""
    shutil.copytree(Path(__file__).parents[2] / "src" / "lapilli" / "pebble", folder / "model")


def _published(folder: Path, method: str) -> None:
    from tests.checkpoint import published

    _hf(folder / "float", WIDE)
    from lapilli.prompt.tokenizer.fast import llama_tokenizer

    _finish(folder / "float", llama_tokenizer(_assets("tokenizer.model").read_bytes()))
    section = published.awq(64) if method == "awq" else published.gptq(64)
    made, _ = published.convert(
        folder / "float" / "model", folder / "made", section, chosen=published.of_text_layers
    )
    made.rename(folder / "model")


def _hf(folder: Path, text: dict[str, object], *, is_next: bool = False) -> None:
    import torch
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
        MistralConfig,
        SiglipVisionConfig,
    )

    torch.manual_seed(0)
    if is_next:
        config = LlavaNextConfig(
            text_config=MistralConfig(**text, sliding_window=None),
            vision_config=CLIPVisionConfig(**TOWER),
            image_token_index=IMAGE_ID,
            image_grid_pinpoints=[[28, 56], [56, 28], [56, 56]],
        )
        model = LlavaNextForConditionalGeneration(config)
    else:
        config = LlavaConfig(
            text_config=LlamaConfig(**text, tie_word_embeddings=False),
            vision_config=SiglipVisionConfig(**TOWER),
            image_token_index=IMAGE_ID,
            vision_feature_select_strategy="full",
        )
        model = LlavaForConditionalGeneration(config)
    model.half().save_pretrained(folder / "model")


_PIXELS = {
    "do_center_crop": True,
    "do_normalize": True,
    "do_resize": True,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "size": {"shortest_edge": 28},
    "crop_size": {"height": 28, "width": 28},
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "resample": 3,
    "image_processor_type": "CLIPImageProcessor",
}


def _finish(folder: Path, tokenizer: object, *, image: bool = True) -> None:
    """Tokenizer files in the style of transformers."""
    from tokenizers import AddedToken

    if image:
        while tokenizer.get_vocab_size() < IMAGE_ID:
            tokenizer.add_tokens([f"<extra{tokenizer.get_vocab_size()}>"])
        tokenizer.add_special_tokens([AddedToken("<image>", normalized=False)])
    tokenizer.save(str(folder / "model" / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    decoder = {
        str(i): {"content": t.content, "special": t.special, "normalized": t.normalized}
        for i, t in tokenizer.get_added_tokens_decoder().items()
    }
    config = {
        **names,
        "add_bos_token": True,
        "tokenizer_class": "LlamaTokenizer",
        "model_max_length": 2048,
        "padding_side": "left",
        "additional_special_tokens": ["<image>"] if image else [],
        "added_tokens_decoder": decoder,
    }
    _write(folder, "tokenizer_config.json", config)
    _write(folder, "special_tokens_map.json", names)


def _write(folder: Path, name: str, content: object) -> None:
    (folder / "model" / name).write_text(json.dumps(content, indent=1))


def _assets(name: str) -> Path:
    return GOLDEN / "assets" / "open" / name


def _regex(pattern: str) -> object:
    from tokenizers import Regex

    return Regex(pattern)
