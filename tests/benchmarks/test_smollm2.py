"""The recipe of the real model, on a tiny one: off its grid, trained, widened, written."""

import json
from pathlib import Path

import pytest
import torch

import lapilli
from benchmarks import smollm2
from benchmarks.smollm2 import State, Training

TOKENS = [*(f"<{i}>" for i in range(17)), *map(chr, range(33, 127)), "Ġ", "Ċ", "th", "Ġth"]


@pytest.fixture
def state() -> State:
    """Two layers of three heads in one group, 192 wide, on a grid of Q4_1."""
    torch.manual_seed(0)
    sizes = {
        "self_attn.q_proj": (192, 192),
        "self_attn.k_proj": (64, 192),
        "self_attn.v_proj": (64, 192),
        "self_attn.o_proj": (192, 192),
        "mlp.gate_proj": (256, 192),
        "mlp.up_proj": (256, 192),
        "mlp.down_proj": (192, 256),
    }
    found = {"model.embed_tokens.weight": 0.3 * torch.randn(len(TOKENS), 192)}
    found["model.norm.weight"] = 1 + 0.1 * torch.randn(192)
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        for name, shape in sizes.items():
            blocks = torch.randint(16, shape).view(-1, 32).float()
            blocks[:, 0], blocks[:, 1] = 0, 15  # a block has its least and its greatest level
            found[f"{prefix}{name}.weight"] = (0.01 * blocks - 0.07).view(shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"{prefix}{name}.weight"] = 1 + 0.1 * torch.randn(192)
    return found


@pytest.fixture
def words(tmp_path: Path) -> Path:
    path = tmp_path / "words.json"
    types = [3] * 17 + [1] * (len(TOKENS) - 17)
    path.write_text(json.dumps({"tokens": TOKENS, "types": types, "merges": ["t h", "Ġ th"]}))
    return path


def test_text_that_is_measured_on_is_not_trained_on() -> None:
    held_out = smollm2.paragraphs(smollm2.held_out_text())
    trained = [part for text in smollm2.training_texts() for part in smollm2.paragraphs(text)]
    assert not set(held_out) & set(trained)
    assert len(set(held_out)) == len(held_out)
    assert len(smollm2.held_out_text()) > 40_000  # 16 windows of 512 tokens
    assert sum(map(len, trained)) > 500_000


def test_words_are_cut_as_llama_cpp_cuts_smollm(words: Path) -> None:
    cut = smollm2.tokenizer(words)
    assert cut.encode("a that 12").tokens == ["a", "Ġth", "a", "t", "Ġ", "1", "2"]
    assert cut.encode("<3>a").tokens == ["<3>", "a"]
    assert cut.decode(cut.encode("the th").ids) == "the th"


def test_weights_are_on_their_grid_and_then_anywhere_in_their_cells(state: State) -> None:
    before = {name: tensor.clone() for name, tensor in state.items()}
    assert smollm2.share_on_grid(before, state) == 1.0
    smollm2.unround(state)
    assert smollm2.share_on_grid(before, state) == pytest.approx(0.1, abs=0.01)
    moved = [(state[n] - before[n]).abs().max() for n in state if "proj" in n]
    assert 0.0049 < max(moved) <= 0.005 + 1e-6  # steps are 0.01
    assert torch.equal(state["model.norm.weight"], before["model.norm.weight"])


def test_a_widened_model_says_the_same(state: State) -> None:
    wide = smollm2.widen(state, width=256, heads=4)
    assert wide["model.layers.0.self_attn.q_proj.weight"].shape == (256, 256)
    assert wide["model.layers.0.self_attn.k_proj.weight"].shape == (64, 256)
    assert wide["model.layers.0.self_attn.o_proj.weight"].shape == (256, 256)
    assert wide["model.layers.1.mlp.down_proj.weight"].shape == (256, 256)
    assert smollm2.shape_of(wide)["rms_norm_eps"] == pytest.approx(0.75e-5)
    assert smollm2.logits_differ_by(state, wide, list(range(40))) < 1e-4


def test_training_that_was_cut_off_goes_on(state: State, tmp_path: Path) -> None:
    ids = torch.randint(len(TOKENS), (400,), generator=torch.Generator().manual_seed(1)).tolist()
    training = Training(steps=6, rows=2, length=16, learning_rate=1e-3, keep_every=3)
    again = {name: tensor.clone() for name, tensor in state.items()}
    whole = list(smollm2.train(state, ids, training, tmp_path / "whole.pt"))
    assert [figures["step"] for figures in whole] == [1, 2, 3, 4, 5, 6]
    cut = smollm2.train(dict(again), ids, training, tmp_path / "cut.pt")
    for _ in range(4):  # killed in the fourth step: the third was kept
        next(cut)
    rest = list(smollm2.train(again, ids, training, tmp_path / "cut.pt"))
    assert [figures["step"] for figures in rest] == [4, 5, 6]
    assert rest[-1]["loss"] == pytest.approx(whole[-1]["loss"], rel=1e-4)
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.allclose(again[name], state[name], atol=1e-5)


def test_the_learning_rate_warms_up_and_falls_to_a_tenth() -> None:
    training = Training(steps=100, learning_rate=1.0)
    rates = [training.rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0.1, abs=0.01)


def test_perplexity_of_a_model_that_knows_nothing_is_the_vocabulary(state: State) -> None:
    state["model.norm.weight"].zero_()
    state["model.norm.weight"][0] = 1e-6
    found = smollm2.perplexity(smollm2.build(state), list(range(64)), length=32)
    assert found == pytest.approx(len(TOKENS), rel=1e-3)


def test_lapilli_reads_what_is_written(state: State, words: Path, tmp_path: Path) -> None:
    smollm2.write_folder(state, words, tmp_path / "model")
    chat = lapilli.load(str(tmp_path / "model"), device="cpu", dtype="float32")
    assert chat.config.text.hidden_size == 192
    ids = torch.arange(30)[None]
    model = chat.model.language_model
    with torch.inference_mode():
        hidden = model(model.embed(ids), position_ids=torch.arange(30)[None])
        ours = model.logits(hidden)
        theirs = smollm2.build(state)(ids).logits
    assert torch.allclose(ours, theirs, atol=1e-4)
