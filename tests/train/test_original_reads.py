"""What a stage leaves, read as the original reads it: its branches, file names, keys, clean-ups.

Nothing of ours but the files: the language model and the tower are transformers', the adapter is
laid and merged by peft, the projector is two layers of torch.

Source: LLaVA builder.py and llava_arch.py: load_pretrained_model, encode_images.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoTokenizer, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from lapilli.train.recipe import SaveRecipe
from tests.train.test_results import (  # noqa: F401  fixtures
    IDS,
    LORA,
    PIXELS,
    finished,
    llava,
    logits_of,
    parts,
    recipe_of,
    same,
)


class Original(nn.Module):
    """Where the original has its parts: `model.mm_projector`, `model.vision_tower.vision_tower`."""

    def __init__(self, path, base):
        super().__init__()
        raw = json.loads((path / "config.json").read_text())
        ours = {key: raw.pop(key) for key in ("model_type", "architectures", "torch_dtype")}
        assert ours["model_type"] == "llava_llama"
        assert (raw["mm_projector_type"], raw["mm_vision_select_layer"]) == ("mlp2x_gelu", -2)
        config = LlamaConfig(**raw)
        whole = LlamaForCausalLM.from_pretrained(base or path, config=config, dtype="float32")
        width = raw["hidden_size"]
        whole.model.mm_projector = nn.Sequential(
            nn.Linear(raw["mm_hidden_size"], width), nn.GELU(), nn.Linear(width, width)
        )
        holder = nn.Module()
        holder.vision_tower = nn.Module()  # transformers from 5.20 lost this part of the names
        self.tower = CLIPVisionModel.from_pretrained(raw["mm_vision_tower"], dtype="float32")
        if hasattr(self.tower, "vision_model"):
            holder.vision_tower = self.tower
        else:
            holder.vision_tower.vision_model = self.tower
        self.lm = whole
        if raw["unfreeze_mm_vision_tower"]:  # built before the weights come, not after
            whole.model.vision_tower = holder

    def take(self, tensors):
        """Every tensor has its place, as nobody would notice otherwise: strict=False there."""
        assert self.lm.load_state_dict(tensors, strict=False).unexpected_keys == []

    def forward(self, ids, pixels):
        seen = self.tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        image = self.lm.get_decoder().mm_projector(seen)[0]
        words = self.lm.get_input_embeddings()(torch.tensor(ids))
        embeds = torch.cat([words[:1], image, words[1:]])[None]
        return self.lm(inputs_embeds=embeds).logits[0]


def read(path, base=None):
    """load_pretrained_model of a llama: with an adapter, with a projector alone, or whole."""
    import peft  # here: three seconds that only a run of these tests should pay

    found = Original(path, base)
    if (path / "adapter_config.json").is_file():
        beside = torch.load(path / "non_lora_trainables.bin", weights_only=True)
        beside = {name.removeprefix("base_model."): tensor for name, tensor in beside.items()}
        if any(name.startswith("model.model.") for name in beside):
            beside = {name.removeprefix("model."): tensor for name, tensor in beside.items()}
        found.take(beside)
        laid = peft.PeftModel.from_pretrained(found.lm, str(path))
        found.lm = laid.merge_and_unload()
    elif base is not None:
        found.take(torch.load(path / "mm_projector.bin", weights_only=True))
    else:
        found.take(load_file(path / "model.safetensors"))
    tokenizer = AutoTokenizer.from_pretrained(base or path)
    assert found.lm.get_input_embeddings().num_embeddings == len(tokenizer)
    return found.eval()


FORMS = {
    "projector": {"stage": "align"},
    "whole": {},
    "whole with its tower": {"model": {"tune_tower": True}},
    "adapter": {"lora": LORA},
    "adapter with a tower": {"lora": LORA, "model": {"tune_tower": True}},
    "adapter on some layers": {
        "lora": replace(LORA, targets=("language_model.model.layers.0.mlp.{up,down}_proj",))
    },
    "merged": {"lora": LORA, "save": SaveRecipe(merge=True)},
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # peft about itself
@pytest.mark.parametrize("form", FORMS)
def test_the_original_computes_the_same(llava, parts, tmp_path, monkeypatch, form):  # noqa: F811
    out = tmp_path / "llava-lora"
    loaded = finished(recipe_of(llava, **FORMS[form]), out)
    base, _ = parts("llama", "clip")
    lies_on_base = form == "projector" or form.startswith("adapter")
    monkeypatch.chdir(out)  # where it looks for a tower of a relative name
    found = read(Path(out), base if lies_on_base else None)
    with torch.inference_mode():
        same(found(IDS, PIXELS), logits_of(loaded.model))
