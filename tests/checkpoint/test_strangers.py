"""Hostile files: each kind ends in one CheckpointError of one line."""

import base64
import io
import json
import os
import shutil
import struct
import zipfile
from contextlib import suppress
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from lapilli.checkpoint.formats.weights import (
    PickledShard,
    SafetensorsShard,
    TensorInfo,
    find_weight_files,
    open_shard,
)
from lapilli.checkpoint.load import load_checkpoint
from lapilli.checkpoint.source import read_json, read_optional_json, resolve
from lapilli.config.reader import MOST_BYTES, MOST_DEPTH
from lapilli.errors import CheckpointError, PromptError
from lapilli.prompt.message import Message
from lapilli.prompt.tokenizer import TokenizerFiles, build_tokenizer
from tests.fuzz.damage import damaged_pickle


def refused(match=None):
    return pytest.raises(CheckpointError, match=match)


# JSON


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (b"[" * 100_000, "nested more than"),
        (b'{"a":' * (MOST_DEPTH + 1) + b"1" + b"}" * (MOST_DEPTH + 1), "nested more than"),
        (b'{"a": ' + b"9" * 5000 + b"}", "digits"),
        (b'{"a": "\\ud800"}', "half a character"),
        ('{"a": 1}'.encode("utf-16"), "UTF-16 text, expected UTF-8"),
        ('{"a": 1}'.encode("utf-16-le"), "UTF-16 text, expected UTF-8"),
        (b'{"a": "\xff"}', "not UTF-8 text"),
        (b"", "not valid JSON"),
        (b" " * (MOST_BYTES + 1), "has more than"),
    ],
)
def test_json_beyond_the_limits(tmp_path, text, match):
    (tmp_path / "config.json").write_bytes(text)
    with refused(match) as caught:
        read_json(tmp_path / "config.json")
    assert "\n" not in str(caught.value)


def test_json_with_a_byte_order_mark_is_read(tmp_path):
    (tmp_path / "config.json").write_bytes(b'\xef\xbb\xbf{"a": 1, "b": "\\ud83d\\ude00"}')
    assert read_json(tmp_path / "config.json") == {"a": 1, "b": "\N{GRINNING FACE}"}


# What stands in the place of a file


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda path: path.mkdir(), "is a directory, expected a file"),
        (os.mkfifo, "is a device or a pipe, expected a file"),
        (lambda path: path.symlink_to("/dev/zero"), "is a device or a pipe"),
        (lambda path: path.symlink_to(path.name), "cannot be read"),
        (lambda path: path.symlink_to("nothing"), "a link to nothing"),
        (lambda path: path.symlink_to("/proc/self/mem"), None),
    ],
)
def test_no_regular_file(tmp_path, make, match):
    make(tmp_path / "config.json")
    with refused(match):
        read_optional_json(tmp_path / "config.json")
    make(tmp_path / "model.safetensors")
    with refused(match):
        open_shard(tmp_path / "model.safetensors")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_nobody_may_read(tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).touch(mode=0)
    with refused("Permission denied"):
        read_json(tmp_path / "config.json")
    with refused("Permission denied"):
        open_shard(tmp_path / "model.safetensors")


def test_a_file_larger_than_the_memory(tmp_path):
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(10**12)
    with refused("has more than"):
        read_json(tmp_path / "config.json")


def test_gguf_says_what_it_is(tmp_path):
    (tmp_path / "llava.Q4_K.gguf").write_bytes(b"GGUF\3\0\0\0" + b"\0" * 64)
    with refused("llava.Q4_K.gguf is GGUF, the format of llama.cpp, .* take the checkpoint"):
        load_checkpoint(tmp_path)
    with refused("is GGUF"):
        load_checkpoint(tmp_path / "llava.Q4_K.gguf")
    (tmp_path / "model.safetensors").write_bytes(b"GGUF\3\0\0\0" + b"\0" * 64)
    with refused("model.safetensors is GGUF"):
        open_shard(tmp_path / "model.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with refused("Git LFS pointer"):
        open_shard(tmp_path / "pytorch_model.bin")


@pytest.mark.parametrize("name", ["~nobody-of-this-name/x", "x" * 5000, "a\0b", "/" + "y" * 300])
def test_names_that_are_no_path_are_refused(name, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with refused() as caught:
        resolve(name)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("weight_map", "match"),
    [
        ({"a": "../../etc/passwd"}, "outside its directory"),
        ({"a": "/etc/passwd"}, "outside its directory"),
        ({"a": ["x"]}, "must map tensors to file names"),
        ({"a": "no\0name"}, "missing"),
        ({"a": "y" * 100_000}, "missing"),
    ],
)
def test_an_index_that_names_anything(tmp_path, weight_map, match):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with refused(match):
        find_weight_files(tmp_path)


# safetensors


def safetensors(path, entry, *, body=16, header=None):
    text = json.dumps({"a": entry}).encode() if header is None else header
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * body)
    return path


GOOD = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


@pytest.mark.parametrize(
    "changes",
    [
        {"shape": "22"},
        {"shape": [2.0, 2]},
        {"shape": [True, 4]},
        {"shape": [-2, -2]},
        {"shape": [2**70, 2]},
        {"shape": [1] * 100 + [4]},
        {"shape": [0, 2**62, 2**62], "data_offsets": [0, 0]},
        {"shape": [[2], 2]},
        {"shape": None},
        {"data_offsets": ["0", "16"]},
        {"data_offsets": [0.0, 16.0]},
        {"data_offsets": [False, 16]},
        {"data_offsets": [16, 0]},
        {"data_offsets": [-16, 0]},
        {"data_offsets": [2**63, 2**63 + 16]},
        {"data_offsets": [0, 16, 32]},
        {"dtype": "U64"},
        {"dtype": ["F32"]},
        {"dtype": None},
    ],
)
def test_entries_of_a_header(tmp_path, changes):
    with refused():
        SafetensorsShard(safetensors(tmp_path / "x.safetensors", {**GOOD, **changes}))


@pytest.mark.parametrize(
    "header",
    [
        b"[" * 100_000,
        b'{"a": ' + b"9" * 5000 + b"}",
        b'{"a": 1}',
        b"[]",
        json.dumps({"a": GOOD}).encode()[:-1] + b', "a": 1}',
        json.dumps({"a": GOOD, "b": GOOD}).encode(),
        json.dumps({"a": GOOD, "b": {**GOOD, "data_offsets": [8, 24]}}).encode(),
    ],
)
def test_headers(tmp_path, header):
    with refused():
        SafetensorsShard(safetensors(tmp_path / "x.safetensors", GOOD, header=header, body=32))


def test_a_header_that_says_it_is_longer_than_the_memory(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", 2**63) + b"{}")
    with refused("truncated or no safetensors"):
        SafetensorsShard(tmp_path / "x.safetensors")


# torch.save


WEIGHT = torch.ones(4, 4)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: WEIGHT.to_sparse(), "sparse"),
        (lambda: torch.quantize_per_tensor(WEIGHT, 0.1, 0, torch.qint8), "quantized"),
        (lambda: torch.empty(2**40, device="meta"), "meta"),
        (lambda: torch.nested.nested_tensor([WEIGHT, WEIGHT]), "nested"),
        (lambda: WEIGHT.to(torch.complex64), "complex64"),
        (lambda: torch.ones(1).expand(2**20, 2**20), "larger than what is stored"),
        (lambda: torch._neg_view(WEIGHT), "negated"),
        (lambda: WEIGHT.reshape([1] * 10 + [16]), "11 dimensions"),
        (lambda: {"inner": WEIGHT}, "expected a tensor"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_tensors_that_are_no_weights(tmp_path, make, match):
    torch.save({"a": make()}, tmp_path / "x.bin")
    with refused(match):
        PickledShard(tmp_path / "x.bin")


def test_a_transposed_weight_is_one(tmp_path):
    torch.save({"a": WEIGHT.half().t(), "b": WEIGHT[1:, 2]}, tmp_path / "x.bin")
    assert PickledShard(tmp_path / "x.bin").infos["b"] == TensorInfo((3,), torch.float32, "x.bin")


@pytest.mark.slow
@pytest.mark.parametrize("member", ["x/data.pkl", "x/data/0"])
def test_a_zip_bomb(tmp_path, member):
    torch.save({"a": WEIGHT}, whole := io.BytesIO())
    with (
        zipfile.ZipFile(whole) as old,
        zipfile.ZipFile(tmp_path / "x.bin", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for name in old.namelist():
            more = b"\0" * (64 << 20) if name.endswith(member.partition("/")[2]) else b""
            new.writestr(name, old.read(name) + more)
    with refused("compressed archive"):
        PickledShard(tmp_path / "x.bin")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(30))
def test_damaged_pickles(tmp_path, seed):
    torch.save({"a": WEIGHT, "b": WEIGHT.half()}, whole := io.BytesIO())
    (tmp_path / "x.bin").write_bytes(damaged_pickle(whole.getvalue(), Random(seed)))
    with suppress(CheckpointError):  # every other error fails the test
        PickledShard(tmp_path / "x.bin")


# Numbers of another kind than the parameter has


def change(golden, tmp_path, variant, edit):
    _, built, _ = golden(variant)
    shutil.copytree(built["model_path"], tmp_path / "model")
    file = next(Path(tmp_path / "model").glob("*.safetensors"))
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    edit(tensors)
    save_file(tensors, file)
    return tmp_path / "model"


def test_integers_where_floats_belong(golden, tmp_path):
    name = "model.layers.0.mlp.up_proj.weight"

    def edit(tensors):
        tensors[name] = (tensors[name] * 50).to(torch.int8)

    path = change(golden, tmp_path, "llava-v1.5-tiny-leftpad", edit)
    with refused(rf"{name} is torch.int8, expected torch.float32"):
        load_checkpoint(path, device="cpu", dtype="float32")


# Tokenizers


def words(normalizer=None, **more):
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = more.get("pre_tokenizer")
    return tokenizer.to_str()


@pytest.mark.parametrize(
    "normalizer",
    [
        normalizers.Replace("a", "a" * 1000),
        normalizers.Replace(Regex(""), "b" * 100),
        normalizers.Sequence([normalizers.Replace("a", "aa")] * 20),
        normalizers.Sequence([normalizers.NFC()] * 200),
        normalizers.Prepend("x" * 100_000),
        normalizers.Sequence([normalizers.Sequence([normalizers.Replace("a", "a" * 9)] * 2)] * 2),
    ],
)
def test_a_normalizer_that_explodes(normalizer):
    with refused("normalizer has .* steps that make a text up to"):
        build_tokenizer(TokenizerFiles(json=words(normalizer)), fast=True)


def test_normalizers_that_are_published():
    albert = normalizers.Sequence(
        [
            normalizers.Replace("``", '"'),
            normalizers.NFKD(),
            normalizers.StripAccents(),
            normalizers.Lowercase(),
            normalizers.Precompiled(charsmap("\N{ARABIC LIGATURE SALLALLAHOU ALAYHE WASALLAM}")),
            normalizers.Replace(Regex(" {2,}"), "▁"),
        ]
    )
    tokenizer = build_tokenizer(TokenizerFiles(json=words(albert)), fast=True)
    assert tokenizer.vocab_size == 2


def charsmap(text):
    """What SentencePiece stores for a model without rules, and one text that nothing leads to."""
    trie = struct.pack("<I", 0) * 256
    return struct.pack("<I", len(trie)) + trie + text.encode() + b"\0"


@pytest.mark.parametrize(
    "change",
    [
        {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": [["a", "b"]]}},
        {"model": {"type": "WordLevel", "vocab": {"b": 0}, "unk_token": "missing"}},
        {"model": {"type": "Unigram", "vocab": [], "unk_id": 5}},
        {"normalizer": {"type": "Replace", "pattern": {"Regex": "("}, "content": "x"}},
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "!"}},
        {
            "model": {
                "type": "BPE",
                "vocab": {"a": 0, "b": 1, "ab": 2},
                "merges": [["a", "b"]],
                "continuing_subword_prefix": "<s>",
            }
        },
        {
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "x", "type_id": 0}}],
                "pair": [],
                "special_tokens": {"x": {"id": "x", "ids": [99], "tokens": ["x"]}},
            }
        },
    ],
)
def test_a_tokenizer_that_cannot_work(change, capfd):
    source = {**json.loads(words()), **change}
    with refused("tokenizer.json") as caught:
        build_tokenizer(TokenizerFiles(json=json.dumps(source)), fast=True)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""  # a panic of the library writes a trace


def test_a_pattern_that_backtracks():
    """The library gives up after ten million steps, by a panic."""
    split = pre_tokenizers.Split(Regex("(a+)+$"), "isolated")
    tokenizer = build_tokenizer(TokenizerFiles(json=words(pre_tokenizer=split)), fast=True)
    with refused("the library tokenizers fails on it"):
        tokenizer.encode("a" * 40 + "!")


@pytest.mark.parametrize("key", ["x", "-1", "1" * 5000, "²"])
def test_ids_of_added_tokens(key):
    config = {"added_tokens_decoder": {key: {"content": "<x>"}}}
    with refused("added_tokens_decoder has the key"):
        build_tokenizer(TokenizerFiles(json=words(), config=config), fast=True)


def test_a_charsmap_that_makes_much_of_little():
    source = json.loads(words())
    blob = base64.b64encode(charsmap("x" * 1_000_000)).decode()
    source["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": blob}
    with refused("tokenizer.json"):
        build_tokenizer(TokenizerFiles(json=json.dumps(source)), fast=True)


@pytest.mark.parametrize("key", ["num_hidden_layers", "n_layer", "n_embd", "n_positions"])
def test_sizes_of_a_family_that_transformers_would_build(tmp_path, key):
    raw = {"model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"], key: 10**9}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    (tmp_path / "tokenizer.json").write_text(words())
    save_file({"a": WEIGHT}, tmp_path / "model.safetensors")
    with refused(f"{key} must be a number of at most"):
        load_checkpoint(tmp_path, device="cpu")


# Whole folders


def config_with(**keys):
    def damage(folder):
        file = folder / "config.json"
        text = json.dumps(json.loads(file.read_text()) | keys)
        file.unlink()  # a link to the file of the package
        file.write_text(text)

    return damage


def file_with(name, content, **keys):
    def damage(folder):
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_bytes(content)
        config_with(**keys)(folder)

    return damage


def chat_template(text):
    return file_with("chat_template.jinja", text, lapilli_template="chat_template")


@pytest.fixture
def pebble_copy(tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(resolve("pebble"), folder, copy_function=os.symlink)
    return folder


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (config_with(num_key_value_heads=5), "config.json: num_attention_heads 4 is not a mult"),
        (config_with(head_dim="x"), "config.json: head_dim must be"),
        (config_with(vocab_size=1201), "1201 entries: config.json and weights do not belong"),
        (config_with(num_hidden_layers=6), "9 parameters have no tensor"),
        (config_with(torch_dtype="../../etc"), "torch_dtype is '../../etc', choose from float32"),
        (config_with(torch_dtype=""), "torch_dtype is '', choose from"),
        (config_with(hidden_act=""), "hidden_act is '', choose from"),
        (config_with(mm_projector_type=""), "mm_projector_type"),
        (config_with(mm_patch_merge_type=""), "mm_patch_merge_type ''"),
        (config_with(mm_vision_select_feature=""), "mm_vision_select_feature is ''"),
        (config_with(image_aspect_ratio=""), "image_aspect_ratio ''"),
        (config_with(lapilli_template="gone"), "config.json says lapilli_template gone: no templ"),
        (config_with(lapilli_template=""), "no template is called ''"),
        (config_with(lapilli_template="chat_template"), "no chat template lies beside it"),
        (config_with(quantization_config={"quant_method": "foo"}), "quantized by 'foo'"),
        (file_with("tokenizer.model", b""), r"tokenizer.model \(0 bytes\) is not a Sentence"),
        (file_with("added_tokens.json", b'{"a": "x"}'), "added_tokens.json: a must be"),
        (file_with("generation_config.json", b'{"eos_token_id": "x"}'), "generation_config.json"),
        (chat_template(b"{% if"), "chat_template.jinja: .* is not a template: line 1"),
    ],
)
def test_what_is_wrong_with_a_folder_names_it(pebble_copy, damage, match):
    damage(pebble_copy)
    with refused(match) as caught:
        load_checkpoint(pebble_copy, device="cpu")
    assert str(caught.value).startswith(str(pebble_copy))
    assert "\n" not in str(caught.value)


def test_a_chat_template_that_refuses_a_question_names_its_file(pebble_copy):
    chat_template(b"{% if messages|length == 1 %}{{ range(10**9) }}{% endif %}")(pebble_copy)
    template = load_checkpoint(pebble_copy, device="cpu").template.template
    with refused("copy/chat_template.jinja: .* refuses these 1 messages"):
        template.render([Message.user("Q")])


def test_another_template_replaces_one_that_cannot_be_used(pebble_copy):
    chat_template(b"{% if")(pebble_copy)
    found = load_checkpoint(pebble_copy, device="cpu", template="vicuna_v1").template
    assert found.template.name == "vicuna_v1"
    with pytest.raises(PromptError, match="no template is called 'mine'") as caught:
        load_checkpoint(pebble_copy, device="cpu", template="mine")
    assert not isinstance(caught.value, CheckpointError)  # the caller's fault
