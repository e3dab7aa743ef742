"""Key maps: names of tensors in published files and of parameters in lapilli, one per layout.

original          model.layers.N...   model.mm_projector.0.weight   model.image_newline
model.vision_tower.vision_tower.vision_model...   lm_head.weight
original, MPT     transformer.blocks.N...   transformer.mm_projector.weight
Hugging Face, classic     language_model.model.layers.N...   vision_tower.vision_model...
multi_modal_projector.linear_1.weight   image_newline
transformers from 4.52    model.language_model.layers.N...   model.vision_tower...   lm_head
fresh models of 5.x       as classic, but vision_tower.embeddings... without vision_model

Declared modalities are `lapilli_modalities.NAME...` in every layout, and the blocks that look at
them from between the layers `lapilli_cross_attention.LAYER...`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from lapilli.config.families import find_family
from lapilli.config.model import TextConfig
from lapilli.errors import CheckpointError

T = TypeVar("T")

# Entries of published files that no parameter takes, whatever their prefix: old buffers, the text
# half of two-tower files, SigLIP's pooling head.
DROPPED = re.compile(
    r"\.rotary_emb\.inv_freq$"
    r"|(^|\.)embeddings\.position_ids$"
    r"|\.masked_bias$"
    r"|(^|\.)vision_model\.head\."
    r"|^vision_tower\.head\.|\.vision_tower\.head\."
    r"|^head\.(attention|layernorm|mlp|probe)"
    r"|^text_model\."
    r"|^(visual|text)_projection\."
    r"|^logit_(scale|bias)$"
)


@dataclass(frozen=True, slots=True)
class KeyMap:
    """Prefixes of names in the files and in the model; the first match counts.

    Args:
        name: of the layout, in messages.
        rules: (prefix in the file, prefix in the model).
    """

    name: str
    rules: tuple[tuple[str, str], ...]

    @staticmethod
    def is_dropped(foreign: str) -> bool:
        """Return whether a tensor of the file is dropped on purpose."""
        return DROPPED.search(foreign) is not None

    def to_ours(self, foreign: str) -> str | None:
        """Return the parameter of a tensor of the file; None when no rule matches."""
        for old, new in self.rules:
            if foreign.startswith(old):
                return new + foreign[len(old) :]
        return None

    def to_foreign(self, ours: str) -> str | None:
        """Return the tensor of the file for a parameter by the first rule that matches, or None."""
        return next(iter(self.spellings(ours)), None)

    def rename(self, state: Mapping[str, T]) -> dict[str, T]:
        """Rename a state dict from parameters to the names of the file.

        Raises:
            CheckpointError: the layout has no name for a parameter.
        """
        found: dict[str, T] = {}
        for ours, item in state.items():
            foreign = self.to_foreign(ours)
            if foreign is None:
                raise CheckpointError(f"{ours} has no name in the layout {self.name!r}")
            found[foreign] = item
        return found

    def spellings(self, ours: str) -> tuple[str, ...]:
        """Return all names of a parameter or module in files of this layout."""
        return tuple(old + ours[len(new) :] for old, new in self.rules if ours.startswith(new))


TOWER = "modalities.image.vision_tower.vision_model."
PROJECTOR = "modalities.image.projector."
NEWLINE = "modalities.image.image_newline"
TEXT = "language_model."

ATTENTION = ("lapilli_cross_attention.", f"{TEXT}cross_attention.")
"""The rule of gated cross-attention."""

DECLARED = ("lapilli_modalities.", "modalities.")
"""The rule of declared modalities; the last one of a layout, so that pictures have their own."""

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
        ATTENTION,
        DECLARED,
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
        ATTENTION,
        DECLARED,
    ),
)


def original_keymap(text: TextConfig) -> KeyMap:
    """Return the key map of the original layout for a model with this language model."""
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
        ATTENTION,
        DECLARED,
    ),
)

LANGUAGE_MODEL = KeyMap(
    "language model",
    (
        ("model.", f"{TEXT}model."),
        ("transformer.", f"{TEXT}transformer."),
        ("lm_head.", f"{TEXT}lm_head."),
        ATTENTION,
        DECLARED,
    ),
)


def is_declared(name: str) -> bool:
    """Return whether a parameter belongs to a modality that the configuration declares."""
    return name.startswith("modalities.") and not name.startswith("modalities.image.")


def is_joint(name: str) -> bool:
    """Return whether a parameter joins the parts: a projector, a declared modality, a gated block.

    What is saved beside a language model that stays as it is.
    """
    return name.startswith((PROJECTOR, NEWLINE, ATTENTION[1])) or is_declared(name)


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
