"""The template of a checkpoint: chosen by its files, carried by what is written of it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer

import lapilli
from lapilli import Message
from lapilli.checkpoint.export import export_checkpoint
from lapilli.checkpoint.inspect import inspect_checkpoint
from lapilli.checkpoint.load import load_checkpoint
from lapilli.checkpoint.template import find_chat_template
from lapilli.checkpoint.write.huggingface import save_hf
from lapilli.checkpoint.write.llava import save_llava
from lapilli.compat.evaluation import choose_conversation
from lapilli.errors import ConfigError
from lapilli.prompt.jinja import JinjaTemplate
from lapilli.prompt.template import TEMPLATES
from tests.integration.oracle import make_oracle, picture

NAMES = ("llava-v1.5-mine", "my_run", "llava-llama-2-7b-chat", "mpt", "mistral", "llava-v1.6-34b")
TALK = [
    Message.user("What?", picture(60, 40, 1)),
    Message.assistant("A cat."),
    Message.user("Sure?", picture(28, 90, 2)),
]


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    return make_oracle(
        tmp_path_factory.mktemp("hf") / "hf", next_=False, text="llama", tower="clip"
    ).path


def ids_of(path, **options):
    chat = lapilli.load(str(path), device="cpu", dtype="float32", **options)
    return chat.encode(TALK).encoded.input_ids


def edit(file, change):
    found = json.loads(file.read_text())
    change(found)
    file.write_text(json.dumps(found))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        ("llava-v1.5-tiny-pad", "llava_v1"),
        ("llava-v1.6-vicuna-tiny-336", "llava_v1"),
        ("llava-tiny-identity", "llava_v1"),
        ("llava-tiny-linear-square", "llava_v0"),
        ("llava-v1.6-mistral-tiny", "mistral_instruct"),
        ("llava-mpt-tiny", "mpt"),
    ],
)
def test_the_template_does_not_depend_on_the_folder_name(golden, tmp_path, variant, expected):
    source = Path(golden(variant)[1]["model_path"])
    found = set()
    for name in NAMES:
        shutil.copytree(source, tmp_path / name)
        found.add(inspect_checkpoint(tmp_path / name).template["name"])
        shutil.rmtree(tmp_path / name)
    assert found == {expected}


def test_the_names_of_the_original_go_by_the_name():
    chosen = {name: choose_conversation(name, None) for name in NAMES}
    assert chosen == {
        "llava-v1.5-mine": "llava_v1",
        "my_run": "llava_v0",
        "llava-llama-2-7b-chat": "llava_llama_2",
        "mpt": "mpt",
        "mistral": "mistral_instruct",
        "llava-v1.6-34b": "chatml_direct",
    }


def test_a_chat_version_of_llama_2_is_known_by_its_base(golden, tmp_path):
    source = Path(golden("llava-llama-2-tiny-chat")[1]["model_path"])
    shutil.copytree(source, tmp_path / "mine")
    edit(tmp_path / "mine" / "config.json", lambda c: c.update(_name_or_path="x/llama-2-7b-chat"))
    assert inspect_checkpoint(tmp_path / "mine").template["name"] == "llava_llama_2"


def test_pebble_keeps_its_template():
    assert inspect_checkpoint("pebble").template["name"] == "vicuna_v1"


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["llava", "huggingface"])
@pytest.mark.parametrize("start", ["original", "hf"])
def test_a_changed_template_is_written_as_it_is(golden, hf, tmp_path, layout, start):
    """The name alone would bring the unchanged one back."""
    source = Path(golden("llava-v1.5-tiny-pad")[1]["model_path"]) if start == "original" else hf
    mine = replace(TEMPLATES["llava_v1"], system="Answer in one word.")
    loaded = load_checkpoint(source, device="cpu", dtype="float32", template=mine)
    out, template = tmp_path / "out", loaded.template.template
    if layout == "llava":
        save_llava(out, loaded.model, loaded.config, tokenizer_path=source, template=template)
    else:
        save_hf(
            out,
            loaded.model,
            loaded.config,
            tokenizer=loaded.tokenizer,
            tokenizer_path=source,
            template=template,
        )
    assert ids_of(out) == ids_of(source, template=mine)


def test_a_template_that_no_file_can_hold_is_refused(hf, tmp_path):
    class Mine:
        name = "mine"
        stop = ()

        def render(self, messages, *, open_turn=True):
            return []

    loaded = load_checkpoint(hf, device="cpu", dtype="float32")
    with pytest.raises(ConfigError, match="the template 'mine' is a Mine, which no file of a"):
        save_llava(tmp_path / "out", loaded.model, loaded.config, template=Mine())
    with pytest.raises(ConfigError, match="there is no chat template in None"):
        save_llava(tmp_path / "out", loaded.model, loaded.config, template="chat_template")
    assert not (tmp_path / "out").exists()


def test_another_chat_template_leaves_no_trace_of_the_one_before(hf, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(hf, source)
    edit(source / "tokenizer_config.json", lambda c: c.update(chat_template="{{ 'stale' }}"))
    other = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    loaded = load_checkpoint(source, device="cpu", dtype="float32", template=JinjaTemplate(other))
    save_llava(
        tmp_path / "out",
        loaded.model,
        loaded.config,
        tokenizer_path=source,
        template=loaded.template.template,
    )
    assert find_chat_template(tmp_path / "out") == other
    assert "stale" not in (tmp_path / "out" / "tokenizer_config.json").read_text()


@pytest.mark.slow
def test_another_image_token_stays_the_image_token(hf, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(hf, source)
    for file in source.glob("*"):
        if file.suffix in (".json", ".jinja"):
            file.write_text(file.read_text().replace("<image>", "<|picture|>"))
    expected = ids_of(source)
    for layout in ("llava", "huggingface"):
        export_checkpoint(str(source), tmp_path / layout, layout=layout)
        assert ids_of(tmp_path / layout) == expected
        named = tmp_path / f"{layout} by name"
        export_checkpoint(str(source), named, layout=layout, template="vicuna_v1")
        assert ids_of(named) == ids_of(source, template="vicuna_v1")
    tokens = json.loads((tmp_path / "huggingface" / "processor_config.json").read_text())
    assert tokens["image_token"] == "<|picture|>"
    assert (
        "<image>"
        not in Tokenizer.from_file(str(tmp_path / "huggingface" / "tokenizer.json")).get_vocab()
    )


def test_ids_that_end_an_answer_are_the_models_and_not_the_tokenizers(golden, tmp_path):
    """generation_config.json wins over config.json, and may come from the folder of a base."""
    source = Path(golden("llava-v1.5-tiny-pad")[1]["model_path"])
    loaded = load_checkpoint(source, device="cpu", dtype="float32")
    tokens = replace(loaded.config.tokens, eos_ids=(2, 7))
    config = replace(loaded.config, tokens=tokens)
    for layout in ("llava", "huggingface"):
        out = tmp_path / layout
        if layout == "llava":
            save_llava(out, loaded.model, config, tokenizer_path=source)
        else:
            save_hf(out, loaded.model, config, tokenizer=loaded.tokenizer, tokenizer_path=source)
        again = load_checkpoint(out, device="cpu", dtype="float32")
        assert again.config.tokens.eos_ids == (2, 7)


@pytest.mark.slow
def test_a_checkpoint_is_exported_onto_itself(hf, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(hf, source)
    expected = ids_of(source)
    export_checkpoint(str(source), source, overwrite=True)
    assert ids_of(source) == expected
    assert load_checkpoint(source, device="cpu").config.layout == "llava"


def test_exports_keep_the_rounding_of_unpadded_pictures(tmp_path):
    """Hugging Face rounds the size of an unpadded picture, the original does not."""
    source = make_oracle(tmp_path / "next", next_=True, text="llama", tower="clip").path
    export_checkpoint(str(source), tmp_path / "out")
    image = load_checkpoint(tmp_path / "out", device="cpu").config.image
    assert image.rounds_unpad
