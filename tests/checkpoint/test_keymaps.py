"""Key maps translate names in both directions."""

import pytest

from lapilli.checkpoint.keymaps import (
    HF_LLAVA,
    LANGUAGE_MODEL,
    ORIGINAL,
    ORIGINAL_MPT,
    VISION_TOWER,
)

TOWER = "modalities.image.vision_tower.vision_model."


@pytest.mark.parametrize(
    ("keymap", "foreign", "ours"),
    [
        (
            ORIGINAL,
            "model.layers.3.mlp.up_proj.weight",
            "language_model.model.layers.3.mlp.up_proj.weight",
        ),
        (ORIGINAL, "lm_head.weight", "language_model.lm_head.weight"),
        (ORIGINAL, "model.mm_projector.2.bias", "modalities.image.projector.2.bias"),
        (ORIGINAL, "model.mm_projector.weight", "modalities.image.projector.weight"),
        (ORIGINAL, "model.image_newline", "modalities.image.image_newline"),
        (ORIGINAL, "model.vision_tower.vision_tower.vision_model.encoder.x", f"{TOWER}encoder.x"),
        (
            ORIGINAL_MPT,
            "transformer.blocks.0.attn.Wqkv.weight",
            "language_model.transformer.blocks.0.attn.Wqkv.weight",
        ),
        (ORIGINAL_MPT, "transformer.mm_projector.weight", "modalities.image.projector.weight"),
        (HF_LLAVA, "language_model.model.norm.weight", "language_model.model.norm.weight"),
        (HF_LLAVA, "multi_modal_projector.linear_2.weight", "modalities.image.projector.2.weight"),
        (HF_LLAVA, "vision_tower.vision_model.post_layernorm.bias", f"{TOWER}post_layernorm.bias"),
        (HF_LLAVA, "image_newline", "modalities.image.image_newline"),
        (LANGUAGE_MODEL, "model.embed_tokens.weight", "language_model.model.embed_tokens.weight"),
        (VISION_TOWER, "vision_model.pre_layrnorm.weight", f"{TOWER}pre_layrnorm.weight"),
    ],
)
def test_names_survive_both_directions(keymap, foreign, ours):
    assert keymap.to_ours(foreign) == ours
    assert keymap.to_foreign(ours) == foreign
    assert not keymap.is_dropped(foreign)


@pytest.mark.parametrize(
    ("keymap", "foreign", "ours"),
    [
        (HF_LLAVA, "model.language_model.norm.weight", "language_model.model.norm.weight"),
        (HF_LLAVA, "lm_head.weight", "language_model.lm_head.weight"),
        (HF_LLAVA, "vision_tower.encoder.x", f"{TOWER}encoder.x"),
        (HF_LLAVA, "model.vision_tower.vision_model.encoder.x", f"{TOWER}encoder.x"),
        (HF_LLAVA, "model.vision_tower.encoder.x", f"{TOWER}encoder.x"),
        (
            HF_LLAVA,
            "model.multi_modal_projector.linear_1.bias",
            "modalities.image.projector.0.bias",
        ),
        (ORIGINAL, "model.vision_tower.vision_tower.encoder.x", f"{TOWER}encoder.x"),
        (ORIGINAL_MPT, "model.image_newline", "modalities.image.image_newline"),
        (VISION_TOWER, "encoder.x", f"{TOWER}encoder.x"),
    ],
)
def test_other_spellings(keymap, foreign, ours):
    assert keymap.to_ours(foreign) == ours


@pytest.mark.parametrize(
    ("keymap", "foreign"),
    [
        (ORIGINAL, "model.layers.0.self_attn.rotary_emb.inv_freq"),
        (ORIGINAL, "model.vision_tower.vision_tower.vision_model.embeddings.position_ids"),
        (HF_LLAVA, "vision_tower.head.probe"),
        (HF_LLAVA, "model.vision_tower.vision_model.head.attention.in_proj_bias"),
        (VISION_TOWER, "text_model.encoder.layers.0.mlp.fc1.weight"),
        (VISION_TOWER, "logit_scale"),
        (VISION_TOWER, "logit_bias"),
        (VISION_TOWER, "visual_projection.weight"),
        (VISION_TOWER, "head.probe"),
    ],
)
def test_dropped_on_purpose(keymap, foreign):
    assert keymap.is_dropped(foreign)


@pytest.mark.parametrize("keymap", [ORIGINAL, ORIGINAL_MPT, HF_LLAVA, LANGUAGE_MODEL])
def test_declared_modalities_have_the_same_names_everywhere(keymap):
    foreign, ours = "lapilli_modalities.user.encoder.x", "modalities.user.encoder.x"
    assert (keymap.to_ours(foreign), keymap.to_foreign(ours)) == (ours, foreign)


def test_unknown_names_have_no_parameter():
    assert ORIGINAL.to_ours("vpm.blocks.0.weight") is None
    assert ORIGINAL.to_foreign("detector.weight") is None
