"""Random tiny LLaVAs, made and saved by transformers: the oracle of the parity tests."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaProcessor,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipVisionConfig,
)

SIDE, PATCH = 28, 7
PINPOINTS = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}USER: {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>\n{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
    "{% else %}ASSISTANT: {% for c in m['content'] %}{{ c['text'] }}{% endfor %}"
    "{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
TEXT = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config}


@dataclass(frozen=True)
class Oracle:
    """A saved checkpoint and what made it."""

    path: Path
    model: Any
    processor: Any

    def inputs(self, rows: list[tuple[str, list[Image.Image]]]) -> dict[str, torch.Tensor]:
        """What the oracle's model takes for (question, pictures) rows."""
        texts = [
            self.processor.apply_chat_template(
                [
                    {
                        "role": "user",
                        "content": [
                            *({"type": "image"} for _ in images),
                            {"type": "text", "text": question},
                        ],
                    }
                ],
                add_generation_prompt=True,
            )
            for question, images in rows
        ]
        pictures = [image for _, images in rows for image in images]
        return self.processor(
            text=texts,
            images=pictures or None,
            padding=True,
            return_tensors="pt",
            add_special_tokens=False,
        )

    def answers(self, inputs: dict[str, torch.Tensor], **options: object) -> list[list[int]]:
        """New tokens of every row, cut behind the end token."""
        eos = self.processor.tokenizer.eos_token_id
        out = self.model.generate(**inputs, do_sample=False, pad_token_id=0, **options)
        rows = out[:, inputs["input_ids"].shape[1] :].tolist()
        return [row[: row.index(eos) + 1] if eos in row else row for row in rows]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens: 256 of them, and four special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<pad>", "<s>", "</s>", "<image>"]
    vocabulary = {token: i for i, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["<image>"],
        padding_side="left",
    )


def make_oracle(path: Path, *, next_: bool, text: str, tower: str) -> Oracle:
    """A checkpoint of one kind under `path`, with weights wide enough to have an opinion."""
    torch.manual_seed(len(str((next_, text, tower))))
    tokenizer = make_tokenizer()
    text_config = TEXT[text](
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        **({"sliding_window": 40} if text == "mistral" else {}),
    )
    return make_llava(path, text_config, next_=next_, tower=tower)


def make_llava(
    path: Path, text_config: PreTrainedConfig, *, next_: bool = False, tower: str = "clip"
) -> Oracle:
    """A LLaVA around any language model of transformers with the vocabulary of `make_tokenizer`."""
    tokenizer = make_tokenizer()
    build = CLIPVisionConfig if tower == "clip" else SiglipVisionConfig
    vision_config = build(
        image_size=SIDE,
        patch_size=PATCH,
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=4,
    )
    strategy = "default" if tower == "clip" else "full"
    shared = {
        "vision_config": vision_config,
        "text_config": text_config,
        "image_token_index": 3,
        "vision_feature_select_strategy": strategy,
        "vision_feature_layer": -2,
        "image_seq_length": (SIDE // PATCH) ** 2,
    }
    if next_:
        config = LlavaNextConfig(image_grid_pinpoints=PINPOINTS, **shared)
        model = LlavaNextForConditionalGeneration(config)
    else:
        model = LlavaForConditionalGeneration(LlavaConfig(**shared))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    processor = make_processor(tokenizer, next_=next_, tower=tower, strategy=strategy)
    model.eval().save_pretrained(path)
    processor.save_pretrained(path)
    return Oracle(path, model, processor)


def pixel_processor(family: str, **options: Any) -> Any:
    """The image processor of a family that resizes with PIL: CLIP, LlavaNext or Siglip.

    transformers 5.0 calls it CLIPImageProcessor; later ones keep that name for torchvision's.
    """
    name = f"{family}ImageProcessor"
    kind = getattr(transformers, f"{name}Pil", None) or getattr(transformers, name)
    return kind(**options)


def make_processor(
    tokenizer: PreTrainedTokenizerFast, *, next_: bool, tower: str, strategy: str
) -> LlavaProcessor | LlavaNextProcessor:
    """The preprocessing that belongs to a tower."""
    square = {"height": SIDE, "width": SIDE}
    shared = {
        "tokenizer": tokenizer,
        "patch_size": PATCH,
        "vision_feature_select_strategy": strategy,
        "chat_template": CHAT_TEMPLATE,
        "num_additional_image_tokens": 1 if tower == "clip" else 0,
    }
    edge = {"size": {"shortest_edge": SIDE}, "crop_size": square}
    if next_:
        pixels = pixel_processor("LlavaNext", image_grid_pinpoints=PINPOINTS, **edge)
        return LlavaNextProcessor(image_processor=pixels, **shared)
    if tower == "clip":
        return LlavaProcessor(image_processor=pixel_processor("CLIP", **edge), **shared)
    return LlavaProcessor(image_processor=pixel_processor("Siglip", size=square), **shared)


def picture(width: int, height: int, seed: int) -> Image.Image:
    """A smooth random picture, not one that resampling makes grey."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
