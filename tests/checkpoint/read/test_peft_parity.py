"""Adapters compute what PEFT computes with the same files, or are refused by name."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

import lapilli
from lapilli import Message
from lapilli.checkpoint.export import export_checkpoint
from lapilli.checkpoint.inspect import inspect_checkpoint
from lapilli.checkpoint.read.adapter import parse_adapter_config
from lapilli.checkpoint.read.plan import make_plan
from lapilli.errors import CheckpointError, ConfigError, UnsupportedModelError
from tests.integration.oracle import make_oracle, picture
from tests.versions import needs

# What peft says about itself, about tied weights and about the transformers of today.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

QUESTION = ("What?", [picture(60, 40, 1)])
Q_AND_V = r".*language_model.*\.(q|v)_proj"
V_PROJ = "language_model.layers.1.self_attn.v_proj"


@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
    path = tmp_path_factory.mktemp("peft") / "base"
    return make_oracle(path, next_=False, text="llama", tower="clip")


@pytest.fixture(scope="module")
def inputs(oracle):
    return oracle.inputs([QUESTION])


@pytest.fixture(scope="module")
def bases(oracle):
    """tied or not -> a checkpoint; the tied one has no output layer in its files."""
    tied = oracle.path.with_name("tied")
    shutil.copytree(oracle.path, tied)
    edit(tied / "config.json", tie)
    tensors = load_file(tied / "model.safetensors")
    del tensors["language_model.lm_head.weight"]
    save_file(tensors, tied / "model.safetensors", metadata={"format": "pt"})
    return {False: oracle.path, True: tied}


def edit(file, change):
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))


def tie(config):
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = True


def model_of(path):
    return AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32)


def train(base, out, *, rows=None, **options):
    """A random adapter as PEFT saves it."""
    import peft  # here: three seconds that only a run of these tests should pay

    torch.manual_seed(0)
    model = model_of(base)
    if rows is not None:
        model.resize_token_embeddings(rows)
    given = {"r": 4, "lora_alpha": 8, "target_modules": Q_AND_V, **options}
    model = peft.get_peft_model(model, peft.LoraConfig(**given))
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name or "modules_to_save" in name or name.endswith("layer.bias"):
                value.add_(torch.randn_like(value) * 0.1)
    model.save_pretrained(out)


def with_peft(base, adapter, inputs, rows=None):
    """Logits of PEFT's own loading."""
    import peft

    model = model_of(base)
    if rows is not None:
        model.resize_token_embeddings(rows)
    with torch.inference_mode():
        return peft.PeftModel.from_pretrained(model, adapter).eval()(**inputs).logits[0]


def ours(path, **options):
    """Logits of the same prompt, and the chat."""
    chat = lapilli.load(str(path), device="cpu", dtype="float32", **options)
    ready = chat.encode([Message.user(QUESTION[0], *QUESTION[1])])
    with torch.inference_mode():
        batch = chat.model.embed_prompts([ready.encoded], [ready.media])
        return chat.model.logits(chat.model(batch))[0], chat


def same(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


OF_TOWER = "pattern of the tower"
EQUAL = {
    "patterns by path": {
        "alpha_pattern": {f"model.{V_PROJ}": 64},
        "rank_pattern": {f"model.{V_PROJ}": 2},
    },
    "patterns by the end of a path": {
        "alpha_pattern": {V_PROJ: 64, "v_proj": 3},
        "rank_pattern": {r"layers\.[01]\.self_attn\.q_proj": 2},
        "use_rslora": True,
    },
    OF_TOWER: {
        "alpha_pattern": {"vision_tower.encoder.layers.1.self_attn.v_proj": 64},
        "target_modules": ["q_proj", "v_proj"],
    },
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "biases": {"bias": "all"},
    "layers": {"target_modules": ["q_proj"], "layers_to_transform": [1], "exclude_modules": "x"},
    "projector": {"modules_to_save": ["linear_1"], "target_modules": ["q_proj", "linear_2"]},
    "norms": {"modules_to_save": ["norm", "post_layernorm"]},
    "output layer": {"target_modules": ["q_proj", "lm_head"]},
    "whole output layer": {"modules_to_save": ["lm_head"]},
    "whole embedding": {"modules_to_save": ["embed_tokens"]},
    "both tables": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "both in one": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "embedding and output layer": {
        "modules_to_save": ["embed_tokens"],
        "target_modules": ["lm_head", "q_proj"],
    },
}


RENAMED = needs("transformers", "5.20", "has another name for the tower's layers")
CASES = [pytest.param(name, marks=RENAMED if name == OF_TOWER else ()) for name in EQUAL]


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_logits_are_pefts(bases, inputs, tmp_path, name):
    """Merged over a base with an output layer of its own, beside the weights of a tied one."""
    for tied in (False, True):
        adapter = tmp_path / f"adapter-{tied}"
        train(bases[tied], adapter, **EQUAL[name])
        found, chat = ours(bases[tied], adapter=str(adapter), merge_lora=not tied)
        same(found, with_peft(bases[tied], adapter, inputs))
        assert chat.report.dropped == ()


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_names_of_older_releases(bases, inputs, tmp_path, suffix):
    """Adapters of transformers before 4.52: another prefix, patterns in both spellings."""
    adapter = tmp_path / "adapter"
    train(
        bases[False],
        adapter,
        alpha_pattern={f"model.{V_PROJ}": 64, "q_proj": 4},
        modules_to_save=["multi_modal_projector"],
    )
    expected = with_peft(bases[False], adapter, inputs)
    file = adapter / "adapter_model.safetensors"
    tensors = {
        name.replace("model.model.language_model.", "model.language_model.model.").replace(
            "model.model.multi_modal", "model.multi_modal"
        ): tensor
        for name, tensor in load_file(file).items()
    }
    assert all(".model.model.language" not in name for name in tensors)
    file.unlink()
    if suffix == ".bin":
        torch.save(tensors, file.with_suffix(suffix))
    else:
        save_file(tensors, file)
    same(ours(bases[False], adapter=str(adapter))[0], expected)
    edit(
        adapter / "adapter_config.json",
        lambda config: config.update(
            alpha_pattern={"language_model.model.layers.1.self_attn.v_proj": 64, "q_proj": 4}
        ),
    )
    same(ours(bases[False], adapter=str(adapter))[0], expected)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("init_lora_weights", start) for start in ("pissa", "pissa_niter_16", "olora", "loftq")),
        *(("init_lora_weights", start) for start in ("corda", "lora_ga", "of_tomorrow")),
        ("use_dora", True),
        ("lora_bias", True),
        ("use_qalora", True),
        ("target_parameters", ["mlp.up_proj.weight"]),
        ("trainable_token_indices", [5, 6]),
        ("trainable_token_indices", {"embed_tokens": [5]}),
        ("layer_replication", [[0, 2], [1, 2]]),
        ("megatron_config", {"a": 1}),
        ("alora_invocation_tokens", [5]),
        ("use_bdlora", {"target_modules_bd_a": ["q_proj"]}),
        ("arrow_config", {"top_k": 3}),
        ("kasa_config", {"beta": 1e-4}),
        ("monteclora_config", {"a": 1}),
        ("velora_config", {"a": 1}),
        ("key_of_tomorrow", 3),
        ("peft_type", "ADALORA"),
        ("peft_type", "XLORA"),
    ],
)
def test_variants_of_lora_that_compute_something_else_are_refused_by_name(key, value):
    with pytest.raises(UnsupportedModelError, match=rf"{key} .*not supported.*merge it with PEFT"):
        parse_adapter_config({"peft_type": "LORA", "r": 4, key: value})


def test_the_defaults_of_every_release_are_read():
    """Whatever fields the installed PEFT has: its own defaults are a plain LoRA."""
    import peft

    raw = peft.LoraConfig(target_modules=["q_proj"]).to_dict()
    raw |= {"target_modules": ["q_proj"], "lora_dtype": None, "key_of_tomorrow": False}
    assert parse_adapter_config(raw).rank == 8
    harmless = ("init_lora_weights", "inference_mode", "use_rslora", "ensure_weight_tying")
    for key, value in raw.items():
        if value is False and key not in harmless:
            with pytest.raises(ConfigError, match=key):
                parse_adapter_config(raw | {key: True})


@pytest.mark.parametrize(
    "change",
    [
        {"rank_pattern": {"q_proj": 2.5}},
        {"rank_pattern": {"q_proj": 0}},
        {"alpha_pattern": {"q_proj": float("nan")}},
        {"alpha_pattern": {"(q_proj": 3}},
        {"lora_alpha": float("inf")},
    ],
)
def test_values_that_are_no_numbers_are_refused(change):
    with pytest.raises(ConfigError, match=next(iter(change))):
        parse_adapter_config({"r": 4, **change})


def test_several_adapters_in_one_file_are_refused(bases, tmp_path):
    adapter = tmp_path / "adapter"
    train(bases[False], adapter)
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    more = {name.replace("lora_A", "lora_A.other"): one.clone() for name, one in tensors.items()}
    save_file(tensors | more, file)
    with pytest.raises(CheckpointError, match="two adapters of one module"):
        ours(bases[False], adapter=str(adapter))


@pytest.mark.slow
def test_tokens_that_an_adapter_adds(oracle, bases, inputs, tmp_path):
    """Both tables with more rows, and the tokenizer that has the words for them."""
    adapter = tmp_path / "adapter"
    rows = len(oracle.processor.tokenizer) + 2
    train(bases[False], adapter, rows=rows, modules_to_save=["lm_head", "embed_tokens"])
    found, chat = ours(bases[False], adapter=str(adapter))
    same(found, with_peft(bases[False], adapter, inputs, rows=rows))
    assert chat.model.language_model.config.vocab_size == rows
    assert chat.tokenizer.vocab_size == rows - 2
    shutil.copy(bases[False] / "tokenizer_config.json", adapter)
    shutil.copy(bases[False] / "tokenizer.json", adapter)
    new = [
        {"id": rows - 2 + i, "content": text, "special": False, "normalized": False}
        | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
        for i, text in enumerate(("<loc1>", "<loc2>"))
    ]
    edit(adapter / "tokenizer.json", lambda data: data["added_tokens"].extend(new))
    found, chat = ours(bases[False], adapter=str(adapter))
    same(found, with_peft(bases[False], adapter, inputs, rows=rows))
    assert chat.tokenizer.token_to_id("<loc2>") == rows - 1
    assert chat.template.name == "chat_template"  # the base's: the adapter has none


@pytest.mark.slow
def test_another_output_layer_than_the_embedding_is_used(oracle, bases, inputs, tmp_path):
    """tie_word_embeddings true over files with two tables, as a folded adapter leaves them."""
    path = tmp_path / "other"
    shutil.copytree(oracle.path, path)
    edit(path / "config.json", tie)
    with torch.inference_mode():
        expected = model_of(path)(**inputs).logits[0]
    found, chat = ours(path)
    same(found, expected)
    assert chat.report.dropped == ()
    assert any("tie_word_embeddings" in note for note in chat.report.notes)
    report = inspect_checkpoint(path)
    assert (report.dropped, report.missing) == ((), ())
    tensors = load_file(path / "model.safetensors")
    table = tensors["language_model.model.embed_tokens.weight"]
    tensors["language_model.lm_head.weight"] = table.clone()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    found, chat = ours(path)
    same(found, ours(bases[True])[0])
    assert chat.report.dropped == ("language_model.lm_head.weight",)  # the same numbers twice


def test_a_pinned_revision_of_the_base_is_asked_for(bases, tmp_path, monkeypatch):
    adapter = tmp_path / "adapter"
    train(bases[False], adapter)
    asked = []

    def resolve(source, **_):
        asked.append(source)
        return bases[False]

    monkeypatch.setattr("lapilli.checkpoint.read.directory.resolve", resolve)
    for revision, name in (("abc123", "some/base@abc123"), (None, "some/base")):
        change = {"base_model_name_or_path": "some/base", "revision": revision}
        edit(adapter / "adapter_config.json", lambda config, change=change: config.update(change))
        make_plan(adapter)
        assert asked.pop() == name


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["llava", "huggingface"])
def test_a_folded_output_layer_is_exported(bases, inputs, tmp_path, layout):
    adapter, out = tmp_path / "adapter", tmp_path / "out"
    train(bases[True], adapter, modules_to_save=["lm_head"])
    export_checkpoint(str(bases[True]), out, layout=layout, adapter=str(adapter), dtype="float32")
    expected = with_peft(bases[True], adapter, inputs)
    same(ours(bases[True], adapter=str(adapter))[0], expected)
    loaded = lapilli.load(str(out), device="cpu", dtype="float32")
    head = ours(bases[True], adapter=str(adapter))[1].model.language_model.lm_head.weight
    assert torch.equal(loaded.model.language_model.lm_head.weight, head)
    if layout == "huggingface":
        with torch.inference_mode():
            same(model_of(out)(**inputs).logits[0], expected)
