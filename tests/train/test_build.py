"""Any language model and any tower become a LLaVA that loads and answers; projectors change."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import lapilli
from lapilli.checkpoint.load import load_checkpoint
from lapilli.checkpoint.out_of_distribution import detector_files
from lapilli.checkpoint.source import resolve
from lapilli.errors import (
    CheckpointError,
    ConfigError,
    PromptError,
    ShapeMismatchError,
    UnsupportedModelError,
)
from lapilli.train.build import Joint, build_llava, replace_projector
from tests.integration.oracle import make_tokenizer, picture
from tests.train.parts import LANGUAGE_MODELS, ROWS, TOWERS, Parts

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
PICTURE = picture(60, 40, 1)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return Parts(tmp_path_factory.mktemp("parts"))


def state_of(path):
    return load_checkpoint(path, device="cpu", dtype="float32").model.state_dict()


@pytest.mark.slow
@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("language", LANGUAGE_MODELS)
def test_a_built_checkpoint_loads_and_answers(parts, tmp_path, language, tower):
    base, eyes = parts(language, tower)
    out = tmp_path / "made"
    build_llava(base, eyes, out, joint=Joint(aspect="anyres" if tower == "clip" else "square"))
    moved = tmp_path / "elsewhere"
    out.rename(moved)
    chat = lapilli.load(str(moved), device="cpu", dtype="float32", strict_config=True)
    assert (chat.report.missing, chat.report.unexpected) == ((), ())
    assert isinstance(chat.ask("What?", PICTURE, max_new_tokens=3), str)
    inner = state_of(base)
    found = state_of(moved)
    cut = [name for name in inner if len(inner[name]) == ROWS]
    assert all(torch.equal(found[name], inner[name]) for name in inner if name not in cut)
    assert all(torch.equal(found[name], inner[name][:260]) for name in cut)
    assert cut


def test_the_weights_keep_their_format(parts, tmp_path):
    base, eyes = parts("llama", "clip")
    build_llava(base, eyes, tmp_path / "same")
    build_llava(base, eyes, tmp_path / "other", dtype="float32")
    formats = [json.loads((tmp_path / n / "config.json").read_text()) for n in ("same", "other")]
    assert [raw["torch_dtype"] for raw in formats] == ["bfloat16", "float32"]
    sizes = [(tmp_path / n / "model.safetensors").stat().st_size for n in ("same", "other")]
    assert 1.9 < sizes[1] / sizes[0] < 2.1


@pytest.mark.slow
def test_the_projector_is_torchs_own_start_and_follows_the_seed(parts, tmp_path):
    base, eyes = parts("llama", "clip")
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        build_llava(base, eyes, tmp_path / name, joint=Joint(seed=seed), dtype="float32")
    name = "modalities.image.projector.0.weight"
    one, same, other = (state_of(tmp_path / folder)[name] for folder in "abc")
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    torch.manual_seed(7)
    assert torch.equal(one, torch.nn.Linear(24, 32).weight.bfloat16().float())


def test_a_tower_of_the_hub_is_named_without_its_revision(parts, tmp_path, monkeypatch):
    base, eyes = parts("llama", "clip")
    asked = []

    def fetch(name, *, weights=True):
        asked.append(name)
        return Path(eyes)

    monkeypatch.setattr("lapilli.checkpoint.source.fetch_snapshot", fetch)
    built = build_llava(base, "owner/clip@v1", tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["mm_vision_tower"] == built.config.vision_source == "owner/clip"
    assert not (tmp_path / "out" / "vision_tower").exists()
    assert any("vision_tower" in name for name in state_of(tmp_path / "out"))
    assert asked == ["owner/clip@v1", "owner/clip"]


@pytest.mark.slow
def test_new_vocabulary_rows_are_the_mean_of_the_old(parts, tmp_path):
    base, eyes = parts("llama", "clip")
    raw = tmp_path / "base"
    shutil.copytree(base, raw)
    built = build_llava(
        str(raw), eyes, tmp_path / "out", joint=Joint(use_start_end=True, use_patch_token=True)
    )
    assert built.config.text.vocab_size == 263
    old, new = state_of(raw), state_of(tmp_path / "out")
    assert torch.equal(
        new["language_model.lm_head.weight"], old["language_model.lm_head.weight"][:263]
    )
    grown = tmp_path / "grown"
    tokens = [f"<extra_{i}>" for i in range(4)]
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(tokens)
    tokenizer.save_pretrained(raw)
    build_llava(str(raw), eyes, grown, joint=Joint(use_start_end=True, use_patch_token=True))
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        before, after = old[name], state_of(grown)[name]
        assert len(after) == 267
        assert torch.equal(after[:264], before)
        mean = before.mean(dim=0).bfloat16().float()
        assert torch.equal(after[264:], mean.expand(3, -1))


def test_a_token_pads_and_the_original_names_it(parts, tmp_path):
    base, eyes = parts("llama", "clip")
    raw = tmp_path / "base"
    shutil.copytree(base, raw)
    config = json.loads((raw / "tokenizer_config.json").read_text())
    config.pop("pad_token")
    (raw / "tokenizer_config.json").write_text(json.dumps(config))
    (raw / "special_tokens_map.json").unlink(missing_ok=True)
    build_llava(str(raw), eyes, tmp_path / "out")
    found = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert found["pad_token"] == "</s>"
    assert json.loads((tmp_path / "out" / "config.json").read_text())["pad_token_id"] == 2


def with_chat_template(base, folder, text):
    shutil.copytree(base, folder)
    (folder / "chat_template.jinja").write_text(text)
    return str(folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("language", "text", "expected"),
    [
        ("llama", None, "vicuna_v1"),
        ("mistral", None, "mistral_instruct"),
        ("mpt", None, "mpt"),
        ("mpt", CHATML, "mpt"),
        ("qwen2", CHATML, "chatml_direct"),
        ("llama", "[INST] <<SYS>> {{ messages }} [/INST]", "llava_llama_2"),
        ("llama", "{{ bos_token }}USER: {{ messages }}", "vicuna_v1"),
        ("llama", "<|start_header_id|>{{ messages }}", "vicuna_v1"),
    ],
)
def test_the_template_follows_the_base(parts, tmp_path, language, text, expected):
    base, eyes = parts(language, "clip")
    if text is not None:
        base = with_chat_template(base, tmp_path / "base", text)
    built = build_llava(base, eyes, tmp_path / "out")
    assert built.template == expected
    loaded = load_checkpoint(tmp_path / "out", device="cpu", dtype="float32")
    assert loaded.template.template.name == expected


@pytest.mark.slow
def test_a_template_that_contradicts_the_base_is_refused(parts, tmp_path):
    base, eyes = parts("qwen2", "clip")
    chat = with_chat_template(base, tmp_path / "base", CHATML)
    with pytest.raises(ConfigError, match=r"template 'vicuna_v1' is wrong for .*'<\|im_start\|>'"):
        build_llava(chat, eyes, tmp_path / "out", template="vicuna_v1")
    assert not (tmp_path / "out").exists()
    built = build_llava(chat, eyes, tmp_path / "out", template="vicuna_v1", force=True)
    assert built.template == "vicuna_v1"
    # A base that takes turns in a way that none of ours has, or in none, is not contradicted.
    other = with_chat_template(base, tmp_path / "other", "<|start_header_id|>{{ messages }}")
    for source in (base, other):
        build_llava(source, eyes, tmp_path / "out", template="vicuna_v1", overwrite=True)


def test_a_template_whose_marks_are_no_tokens_is_refused(parts, tmp_path):
    base, eyes = parts("llama", "clip")
    message = r"'chatml_direct' ends turns with '<\|im_end\|>', which is no token"
    with pytest.raises(ConfigError, match=message):
        build_llava(base, eyes, tmp_path / "out", template="chatml_direct")
    built = build_llava(base, eyes, tmp_path / "out", template="chatml_direct", force=True)
    assert any("which is no token" in note for note in built.notes)


def test_an_unknown_template_is_refused(parts, tmp_path):
    base, eyes = parts("llama", "clip")
    with pytest.raises(PromptError, match="no template is called 'vicunja'"):
        build_llava(base, eyes, tmp_path / "out", template="vicunja")


def test_parts_that_are_none_are_refused(parts, tmp_path):
    base, eyes = parts("llama", "clip")
    out = tmp_path / "out"
    build_llava(base, eyes, out)
    with pytest.raises(ConfigError, match="out is a LLaVA already: train it as it is"):
        build_llava(str(out), eyes, tmp_path / "again")
    with pytest.raises(UnsupportedModelError, match=r"a-llama is no vision tower: .*'llama'"):
        build_llava(base, base, tmp_path / "again")
    with pytest.raises(ConfigError, match="b-clip is a vision tower: give it as --vision"):
        build_llava(eyes, eyes, tmp_path / "again")
    with pytest.raises(UnsupportedModelError, match="mm_projector_type 'qformer' is not supported"):
        build_llava(base, eyes, tmp_path / "again", joint=Joint(projector="qformer"))
    with pytest.raises(ConfigError, match="'identity', but the tower has width 24"):
        build_llava(base, eyes, tmp_path / "again", joint=Joint(projector="identity"))
    with pytest.raises(ConfigError, match="the feature layer -9 does not exist"):
        build_llava(base, eyes, tmp_path / "again", joint=Joint(select_layer=-9))
    with pytest.raises(ConfigError, match="dtype 'float8' is unknown"):
        build_llava(base, eyes, tmp_path / "again", dtype="float8")


def test_a_tokenizer_of_another_model_is_refused(parts, tmp_path):
    base, eyes = parts("llama", "clip")
    raw = tmp_path / "base"
    shutil.copytree(base, raw)
    config = json.loads((raw / "config.json").read_text()) | {"vocab_size": 2000}
    (raw / "config.json").write_text(json.dumps(config))
    with pytest.raises(ShapeMismatchError, match="2000 rows, but its tokenizer 260 tokens"):
        build_llava(str(raw), eyes, tmp_path / "out")


def test_a_fewer_tokens_projector(parts, tmp_path):
    base, eyes = parts("llama", "clip")
    build_llava(base, eyes, tmp_path / "out", joint=Joint(projector="pool2x2_mlp2x_gelu"))
    chat = lapilli.load(str(tmp_path / "out"), device="cpu", dtype="float32")
    ready = chat.encode([lapilli.Message.user("What?", PICTURE)])
    assert [span.length for span in ready.encoded.spans] == [1]


@pytest.mark.slow
def test_the_tower_of_a_llava_is_taken_from_it(parts, tmp_path):
    """`--vision pebble`, or any LLaVA with its tower in a folder beside its weights."""
    base, _ = parts("llama", "clip")
    first = build_llava(base, "pebble", tmp_path / "first")
    assert first.config.vision.hidden_size == 256
    assert (tmp_path / "first" / "vision_tower" / "config.json").is_file()
    build_llava(base, str(tmp_path / "first"), tmp_path / "second")
    own, pebbles = state_of(tmp_path / "second"), state_of("pebble")
    towers = [name for name in pebbles if "vision_tower" in name]
    assert towers
    assert all(torch.equal(own[name], pebbles[name]) for name in towers)


@pytest.mark.slow
def test_a_pooled_mlp_keeps_every_weight(tmp_path):
    assert replace_projector("pebble", tmp_path / "llava", projector="pool2x2_mlp2x_gelu") == ()
    before, after = state_of("pebble"), state_of(tmp_path / "llava")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    loaded = load_checkpoint(tmp_path / "llava")
    assert loaded.template.template.name == load_checkpoint("pebble").template.template.name
    # The tower is the same, so what it has seen still is.
    assert detector_files(tmp_path / "llava") == detector_files(resolve("pebble"))


@pytest.mark.slow
def test_a_resampler_is_fresh_and_the_rest_stays(tmp_path):
    fresh = replace_projector("pebble", tmp_path / "llava", projector="resampler4", seed=3)
    assert "queries" in fresh
    before, after = state_of("pebble"), state_of(tmp_path / "llava")
    assert {name for name in after if "projector" in name} == {
        f"modalities.image.projector.{name}" for name in fresh
    }
    assert all(torch.equal(before[n], after[n]) for n in before if "projector" not in n)
    replace_projector("pebble", tmp_path / "same", projector="resampler4", seed=3)
    again = state_of(tmp_path / "same")
    assert all(torch.equal(after[name], again[name]) for name in after)


@pytest.mark.slow
def test_a_projector_that_does_not_fit_is_refused_and_nothing_written(tmp_path):
    with pytest.raises(ConfigError, match="3x3 neighbours of 8x8 patches"):
        replace_projector("pebble", tmp_path / "llava", projector="pool3x3_mlp2x_gelu")
    with pytest.raises(UnsupportedModelError, match="'qformer' is not supported"):
        replace_projector("pebble", tmp_path / "llava", projector="qformer")
    assert list(tmp_path.iterdir()) == []
    replace_projector("pebble", tmp_path / "llava", projector="mlp2x_gelu_pool2x2")
    with pytest.raises(CheckpointError, match="is there already"):
        replace_projector("pebble", tmp_path / "llava", projector="mlp2x_gelu_pool2x2")
