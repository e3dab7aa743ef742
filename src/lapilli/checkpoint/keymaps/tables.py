"""The names in published files: data only.

original          model.layers.N...   model.mm_projector.0.weight   model.image_newline
model.vision_tower.vision_tower.vision_model...   lm_head.weight
original, MPT     transformer.blocks.N...   transformer.mm_projector.weight
Hugging Face, classic     language_model.model.layers.N...   vision_tower.vision_model...
multi_modal_projector.linear_1.weight   image_newline
transformers from 4.52    model.language_model.layers.N...   model.vision_tower...   lm_head
fresh models of 5.x       as classic, but vision_tower.embeddings... without vision_model
"""

from lapilli.checkpoint.keymaps.rules import KeyMap
from lapilli.config.families import find_family
from lapilli.config.model import TextConfig

TOWER = "modalities.image.vision_tower.vision_model."
PROJECTOR = "modalities.image.projector."
NEWLINE = "modalities.image.image_newline"
TEXT = "language_model."

EMBEDDINGS = (f"{TEXT}model.embed_tokens.weight", f"{TEXT}transformer.wte.weight")
OUTPUT = f"{TEXT}lm_head.weight"

ORIGINAL = KeyMap(
    "original LLaVA",
    (
        ("model.vision_tower.vision_tower.vision_model.", TOWER),
        ("model.vision_tower.vision_tower.", TOWER),
        ("model.mm_projector.", PROJECTOR),
        ("model.image_newline", NEWLINE),
        ("model.", f"{TEXT}model."),
        ("lm_head.", f"{TEXT}lm_head."),
    ),
)

ORIGINAL_MPT = KeyMap(
    "original LLaVA with MPT",
    (
        ("transformer.vision_tower.vision_tower.vision_model.", TOWER),
        ("transformer.vision_tower.vision_tower.", TOWER),
        ("transformer.mm_projector.", PROJECTOR),
        ("transformer.image_newline", NEWLINE),
        ("model.image_newline", NEWLINE),
        ("model.mm_projector.", PROJECTOR),
        ("transformer.", f"{TEXT}transformer."),
        ("lm_head.", f"{TEXT}lm_head."),
    ),
)


def original_keymap(text: TextConfig) -> KeyMap:
    """Return the names of a checkpoint in the original layout with this language model."""
    by_stem = {"model": ORIGINAL, "transformer": ORIGINAL_MPT}
    family = find_family(text.family)  # a family that is none of ours is refused with its config
    return by_stem["model" if family is None else family.stem]


HF_LLAVA = KeyMap(
    "Hugging Face LLaVA",
    (
        ("language_model.model.", f"{TEXT}model."),
        ("language_model.lm_head.", f"{TEXT}lm_head."),
        ("model.language_model.", f"{TEXT}model."),
        ("lm_head.", f"{TEXT}lm_head."),
        ("vision_tower.vision_model.", TOWER),
        ("vision_tower.", TOWER),
        ("model.vision_tower.vision_model.", TOWER),
        ("model.vision_tower.", TOWER),
        ("multi_modal_projector.linear_1.", f"{PROJECTOR}0."),
        ("multi_modal_projector.linear_2.", f"{PROJECTOR}2."),
        ("model.multi_modal_projector.linear_1.", f"{PROJECTOR}0."),
        ("model.multi_modal_projector.linear_2.", f"{PROJECTOR}2."),
        ("image_newline", NEWLINE),
        ("model.image_newline", NEWLINE),
    ),
)

LANGUAGE_MODEL = KeyMap(
    "language model",
    (
        ("model.", f"{TEXT}model."),
        ("transformer.", f"{TEXT}transformer."),
        ("lm_head.", f"{TEXT}lm_head."),
    ),
)

VISION_TOWER = KeyMap(
    "vision tower",
    (
        ("vision_model.", TOWER),
        ("embeddings.", f"{TOWER}embeddings."),
        ("encoder.", f"{TOWER}encoder."),
        ("pre_layrnorm.", f"{TOWER}pre_layrnorm."),
        ("post_layernorm.", f"{TOWER}post_layernorm."),
    ),
)
