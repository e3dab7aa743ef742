"""The tokenizer that is written for Hugging Face gives the ids of the one that was loaded."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from lapilli.checkpoint.tokenizer import load_tokenizer, save_tokenizer_with

NAMED = {
    str(index): {"content": name, "special": True, "normalized": False}
    for index, name in enumerate(("<unk>", "<s>", "</s>"))
}
ADDED = {
    "1000": {"content": "<loc1>", "special": False, "normalized": True},
    "1001": {"content": "<loc2>", "special": False, "normalized": True, "lstrip": True},
    "1002": {"content": "[PAD]", "special": True, "normalized": False},
}
SETTINGS = {
    "plain": {},
    "legacy": {"legacy": True},
    "without bos": {"add_bos_token": False},
    "with eos": {"add_eos_token": True},
    "added": {"added_tokens_decoder": NAMED | ADDED, "pad_token": "[PAD]"},
    "added, legacy": {"added_tokens_decoder": NAMED | ADDED, "pad_token": "[PAD]", "legacy": True},
}
PIECES = (
    "<loc1>",
    "<loc2>",
    "[PAD]",
    "<s>",
    "</s>",
    "<unk>",
    " ",
    "  ",
    "\n",
    "a",
    "cat",
    "é",
    ".",
)
TEXTS = st.lists(st.sampled_from(PIECES), max_size=8).map(
    lambda parts: f"USER: {''.join(parts)} A:"
)


@pytest.fixture(scope="module")
def written(golden, tmp_path_factory):
    """Settings -> (tokenizer as loaded, as written and read here, as transformers reads it)."""
    source = Path(golden("llava-v1.5-tiny-pad")[1]["model_path"])
    made = {}
    for name, settings in SETTINGS.items():
        start, out = (tmp_path_factory.mktemp(part) for part in ("start", "out"))
        (start / "tokenizer.model").write_bytes((source / "tokenizer.model").read_bytes())
        config = json.loads((source / "tokenizer_config.json").read_text()) | settings
        (start / "tokenizer_config.json").write_text(json.dumps(config))
        before = load_tokenizer(start, fast=False)
        image_id = save_tokenizer_with(out, start, before, "<image>", processor="LlavaProcessor")
        assert image_id == before.vocab_size
        # By it transformers decides that tokenizer.json is to be followed.
        (out / "config.json").write_text('{"model_type": "llava"}')
        made[name] = before, load_tokenizer(out, fast=True), AutoTokenizer.from_pretrained(out)
    return made


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
@given(text=TEXTS)
def test_same_ids(written, name, text):
    before, after, theirs = written[name]
    ids = before.encode(text)
    assert after.encode(text) == ids
    assert theirs(text)["input_ids"] == [*ids, *before.suffix_ids]


@pytest.mark.parametrize("name", SETTINGS)
def test_special_tokens_keep_their_roles(written, name):
    before, after, theirs = written[name]
    assert after.special_ids == before.special_ids | {after.token_to_id("<image>")}
    assert (after.bos_id, after.eos_id) == (before.bos_id, before.eos_id)
    assert theirs.pad_token_id == after.pad_id == (before.pad_id or before.unk_id)


def test_the_tokenizer_that_was_loaded_is_written(written, golden, tmp_path):
    """A folder may have a tokenizer.json too, which the original does not read for a Llama."""
    source = Path(golden("llava-v1.5-tiny-pad")[1]["model_path"])
    start = tmp_path / "start"
    start.mkdir()
    for name in ("tokenizer.model", "tokenizer_config.json"):
        (start / name).write_bytes((source / name).read_bytes())
    legacy = written["legacy"][1]._rust  # what a conversion with `legacy: true` left there
    legacy.save(str(start / "tokenizer.json"))
    before = load_tokenizer(start, fast=False)
    save_tokenizer_with(tmp_path, start, before, "<image>", processor="LlavaProcessor")
    text = "ASSISTANT: A cat.</s>USER: Sure?"
    assert load_tokenizer(tmp_path, fast=True).encode(text) == before.encode(text)
