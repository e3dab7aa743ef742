"""Figures of formats: what llama-perplexity says, and lapilli's own on a tiny model."""

import json
import math
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import quality, smollm2
from benchmarks.quality import OURS, Reference, Result, read_statistics, read_tokens
from lapilli.quant import QuantConfig
from tests.benchmarks.test_gguf_header import write_gguf

# The end of what `llama-perplexity --kl-divergence` said of Q4_0; lines between are left out.
SAID = """====== Perplexity statistics ======
Mean PPL(Q)                   :  25.932229 ±   1.109982
Mean PPL(base)                :  18.157188 ±   0.750303
Cor(ln(PPL(Q)), ln(PPL(base))):  94.03%
Mean PPL(Q)/PPL(base)         :   1.428207 ±   0.020867
Mean PPL(Q)-PPL(base)         :   7.775041 ±   0.478388
====== KL divergence statistics ======
Mean    KLD:   0.364588 ±   0.005267
Maximum KLD:   4.838233
Median  KLD:   0.296579
====== Token probability statistics ======
Mean    Δp: -4.577 ± 0.211 %
Same top p: 67.525 ± 0.733 %
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of one layer, 64 wide, in Hugging Face's layout."""
    folder = tmp_path_factory.mktemp("quality")
    torch.manual_seed(0)
    sizes = {"self_attn.q_proj": 64, "self_attn.k_proj": 64, "self_attn.v_proj": 64}
    sizes |= {"self_attn.o_proj": 64, "mlp.gate_proj": 128, "mlp.up_proj": 128}
    prefix = "model.layers.0."
    state = {f"{prefix}{name}.weight": 0.2 * torch.randn(size, 64) for name, size in sizes.items()}
    state[f"{prefix}mlp.down_proj.weight"] = 0.2 * torch.randn(64, 128)
    state |= {f"{prefix}{n}_layernorm.weight": torch.ones(64) for n in ("input", "post_attention")}
    state["model.norm.weight"] = torch.ones(64)
    state["model.embed_tokens.weight"] = torch.randn(150, 64)
    tokens = [*(f"<{i}>" for i in range(17)), *(chr(i) for i in range(33, 127)), "Ġ", "Ċ"]
    tokens += [f"w{i}" for i in range(150 - len(tokens))]
    words = folder / "words.json"
    words.write_text(json.dumps({"tokens": tokens, "types": [1] * 150, "merges": []}))
    smollm2.write_folder(state, words, folder / "model")
    return folder / "model"


def test_figures_are_read_of_what_is_said() -> None:
    found = read_statistics(SAID)
    assert found == {
        "perplexity": 25.932229,
        "perplexity of float32": 18.157188,
        "kl": 0.364588,
        "kl error": 0.005267,
        "kl median": 0.296579,
        "same": pytest.approx(0.67525),
    }


def test_a_figure_that_is_not_said_is_named() -> None:
    with pytest.raises(SystemExit, match="no 'kl'"):
        read_statistics(SAID.replace("KLD", "JSD"))


def test_tokens_are_read_of_the_file_of_log_probabilities(tmp_path: Path) -> None:
    path = tmp_path / "base.bin"
    tokens = np.arange(12, dtype="<i4")
    path.write_bytes(struct.pack("<8sIii", b"_logits_", 4, 49152, 3) + tokens.tobytes() + b"rest")
    assert read_tokens(path).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    path.write_bytes(b"GGUF" + bytes(40))
    with pytest.raises(SystemExit, match="holds no log-probabilities"):
        read_tokens(path)


def test_bits_of_a_gguf_file(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    sizes = {"token_embd.weight": ([64, 10], 640), "blk.0.attn_norm.weight": ([64], 256)}
    sizes |= {"blk.0.ffn_up.weight": ([64, 8], 256), "output.weight": ([64, 10], 640)}
    write_gguf(path, sizes)
    found = quality.gguf_bits(path)
    assert found["bits"] == 4
    assert found["bits of the head"] == 8
    assert found["bits with the head"] == pytest.approx(8 * (256 + 640) / (512 + 640))


def test_the_same_model_differs_in_nothing(model: Path) -> None:
    truth = _reference(model)
    found = truth.compare(quality.load(model, None))
    assert found["kl"] == pytest.approx(0, abs=1e-9)
    assert found["same"] == found["greedy answers equal"] == 1
    assert found["perplexity"] == found["perplexity of float32"] == truth.perplexity


def test_answers_are_the_same_up_to_the_first_other_token() -> None:
    assert quality._common((1, 2, 3), (1, 2, 3)) == 3
    assert quality._common((1, 2, 3), (1, 5, 3)) == 1
    assert quality._common((1, 2), (1, 2, 3)) == 2


def test_fewer_bits_differ_more(model: Path) -> None:
    truth = _reference(model)
    rows, bits = {}, {}
    for name in ("lapilli int8", "lapilli int4, symmetric g128"):
        chat = quality.load(model, OURS[name])
        rows[name] = truth.compare(chat)
        bits[name] = quality.own_bits(chat.model.language_model)
    eight, four = rows.values()
    assert 0 < eight["kl"] < four["kl"] / 10
    assert eight["same"] > four["same"]
    assert eight["kl error"] > 0
    eight_bits, four_bits = bits.values()
    # 64 inputs share a scale of 32 bits by row, those of 4 bits are padded to no group.
    assert 8 < eight_bits["bits"] < 8.6
    assert 4 < four_bits["bits"] < 4.6
    assert four_bits["bits of the head"] > 8


def test_kl_and_perplexity_are_those_of_the_second_half(model: Path) -> None:
    truth = _reference(model)
    window = truth.windows[0]
    chat = quality.load(model, QuantConfig(bits=8))
    logs = quality.log_probabilities(quality.load(model, None), window)
    others = quality.log_probabilities(chat, window)
    assert logs.shape == (15, 150)  # of 32: positions 16 to 30 tell tokens 17 to 31
    kl = (logs.exp() * (logs - others)).sum(-1)
    one = Reference(quality.load(model, None), window[None], [[1, 2, 3]])
    assert one.compare(chat)["kl"] == pytest.approx(kl.mean().item(), rel=1e-4)
    told = torch.tensor([logs[i, window[17 + i]] for i in range(15)])
    assert one.perplexity == pytest.approx(math.exp(-told.mean()), rel=1e-5)


def _reference(model: Path) -> Reference:
    windows = torch.randint(150, (3, 32), generator=torch.Generator().manual_seed(2))
    return Reference(quality.load(model, None), windows, [[1, 2, 3], [50, 60, 70, 80]])


def test_what_was_measured_is_not_measured_again(tmp_path: Path) -> None:
    row = {"kl": 0.1, "same": 0.9, "bits": 4.5}
    Result(tmp_path / "quality.json", resume=False).add("lapilli int4", row)
    assert Result(tmp_path / "quality.json", resume=True).has("lapilli int4")
    assert not Result(tmp_path / "quality.json", resume=False).has("lapilli int4")


def test_without_programs_ours_alone_are_measured(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole command on a model that is there already."""
    folder = model.parent
    (folder / "held_out.txt").write_text("w1 w2 no matter what " * 30)
    (folder / "facts.json").write_text('{"perplexity after": 9.0}')
    monkeypatch.setattr(quality, "LENGTH", 32)
    monkeypatch.setattr(quality, "WINDOWS", 2)
    monkeypatch.setattr(quality, "QUESTIONS", 3)
    arguments = ["--folder", str(folder), "--out", str(tmp_path), "--threads", "1"]
    quality.main([*arguments, "--formats", "lapilli int8"])
    found = json.loads((tmp_path / "quality.json").read_text())
    assert set(found["formats"]) == {"lapilli int8"}
    assert found["model"] == {"perplexity after": 9.0}
    assert "--ik" in found["not measured"]["GGUF"]
