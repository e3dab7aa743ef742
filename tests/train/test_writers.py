"""Whatever writes a checkpoint, it is asked as before: same ids, same logits, every turn.

Every writer (export, quantize, the results of a run in every form, save_llava and save_hf as calls)
times every kind of source (the original's layout, Hugging Face's with its chat template in each
place, a template that a person named).
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import lapilli
from lapilli import Message
from lapilli.checkpoint.export import export_checkpoint
from lapilli.checkpoint.load import STORED, load_checkpoint
from lapilli.checkpoint.write.huggingface import save_hf
from lapilli.checkpoint.write.llava import save_llava
from lapilli.prompt.message import MediaPart, TextPart
from lapilli.train.recipe import (
    DataRecipe,
    LoraRecipe,
    ModelRecipe,
    OptimRecipe,
    Recipe,
    RunRecipe,
    SaveRecipe,
)
from lapilli.train.results import Results, save_results
from lapilli.train.stages import choose_trainable, load_start
from tests.integration.oracle import make_oracle, picture

pytestmark = pytest.mark.slow

ONE, OTHER = picture(60, 40, 1), picture(28, 90, 2)
CONVERSATIONS = {
    "first turn": [Message.user("What?", ONE)],
    "second turn": [
        Message.user("What?", ONE),
        Message.assistant("A cat."),
        Message.user("Sure?", OTHER),
    ],
    "two pictures": [Message.user(" two  of  them", ONE, OTHER)],
    "picture last": [Message("user", (TextPart("Look "), MediaPart(ONE)))],
    "pictures between": [
        Message("user", (TextPart("a"), MediaPart(ONE), MediaPart(OTHER), TextPart(" b")))
    ],
    "typed tokens": [Message.user("<image> is no </s>", ONE)],
}
# A system text of its own, further special tokens, and no line of its own for a picture.
WITH_SYSTEM = (
    "{{ bos_token }}{% if messages[0]['role'] != 'system' %}You see.{{ pad_token }} {% endif %}"
    "{% for m in messages %}<{{ m['role'] }}>{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}\n"
)


@dataclass(frozen=True)
class Source:
    """A checkpoint, and the template that a person named for it."""

    path: Path
    template: str | None = None


def put_template(folder, place, text=None):
    """Move the chat template of a folder to another place."""
    file = folder / "chat_template.jinja"
    text = text or file.read_text()
    file.unlink()
    if place == "chat_template.json":
        (folder / place).write_text(json.dumps({"chat_template": text}))
        return
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": text}]
    value = named if place == "tokenizer_config.json" else text
    settings = json.loads((folder / place).read_text())
    (folder / place).write_text(json.dumps({**settings, "chat_template": value}))


@pytest.fixture(scope="module")
def sources(tmp_path_factory, golden):
    """Kind -> Source."""
    made = tmp_path_factory.mktemp("sources")
    hf = make_oracle(made / "hf", next_=False, text="llama", tower="clip").path
    config = make_oracle(made / "config", next_=True, text="mistral", tower="clip").path
    put_template(config, "tokenizer_config.json")
    processor = make_oracle(made / "processor", next_=False, text="llama", tower="clip").path
    put_template(processor, "processor_config.json", WITH_SYSTEM)
    older = make_oracle(made / "older", next_=False, text="qwen2", tower="siglip").path
    put_template(older, "chat_template.json")
    original = Path(golden("llava-v1.5-tiny-pad")[1]["model_path"])  # its tokenizer: legacy false
    mistral = Path(golden("llava-v1.6-mistral-tiny")[1]["model_path"])
    export_checkpoint(str(original), made / "exported", layout="huggingface")
    return {
        "original": Source(original),
        "original, template named": Source(original, "llava_llama_2"),
        "original mistral": Source(mistral),
        "chat_template.jinja": Source(hf),
        "chat_template.jinja, template named": Source(hf, "mistral_instruct"),
        "tokenizer_config.json": Source(config),
        "processor_config.json": Source(processor),
        "chat_template.json": Source(older),
        "exported": Source(made / "exported"),
    }


KINDS = (
    "original",
    "original, template named",
    "original mistral",
    "chat_template.jinja",
    "chat_template.jinja, template named",
    "tokenizer_config.json",
    "processor_config.json",
    "chat_template.json",
    "exported",
)


def answers(path, **options):
    """Conversation -> (ids, logits)."""
    chat = lapilli.load(str(path), device="cpu", dtype="float32", **options)
    found = {}
    for name, messages in CONVERSATIONS.items():
        ready = chat.encode(messages)
        with torch.inference_mode():
            batch = chat.model.embed_prompts([ready.encoded], [ready.media])
            found[name] = (ready.encoded.input_ids, chat.model.logits(chat.model(batch))[0])
    return found


def same(found, expected):
    for name, (ids, logits) in expected.items():
        assert found[name][0] == ids, name
        rows = min(logits.shape[-1], found[name][1].shape[-1])  # an image token more or less
        close = torch.allclose(found[name][1][:, :rows], logits[:, :rows], atol=1e-5, rtol=0)
        assert close, name


def exporting(layout):
    def write(source, out):
        export_checkpoint(str(source.path), out, layout=layout, template=source.template)

    return write


def calling(layout):
    def write(source, out):
        loaded = load_checkpoint(source.path, device="cpu", dtype=STORED, template=source.template)
        # Nobody says which template: it is the one that the checkpoint came with.
        named = {"template": source.template} if source.template else {}
        if layout == "llava":
            save_llava(out, loaded.model, loaded.config, tokenizer_path=source.path, **named)
            return
        save_hf(
            out,
            loaded.model,
            loaded.config,
            tokenizer=loaded.tokenizer,
            tokenizer_path=source.path,
            **named,
        )

    return write


LORA = LoraRecipe(rank=2, alpha=4.0)
HF = SaveRecipe(layout="huggingface")


def training(stage="instruct", precision="float32", **more):
    """The results of a run that learned nothing yet."""

    def write(source, out):
        recipe = Recipe(
            stage=stage,
            optim=OptimRecipe(lr=1e-3),
            run=RunRecipe(batch_size=1, steps=1, precision=precision),
            model=ModelRecipe(checkpoint=str(source.path)),
            data=DataRecipe(template=source.template or ""),
            **more,
        )
        loaded = load_start(recipe)
        results = Results.of(loaded, recipe)
        choose_trainable(loaded.model, recipe)
        save_results(out, loaded.model, results)

    return write


WRITERS = {
    "export": exporting("llava"),
    "export to Hugging Face": exporting("huggingface"),
    "save_llava": calling("llava"),
    "save_hf": calling("huggingface"),
    "projector": training("align"),
    "whole": training(),
    "whole for Hugging Face": training(save=HF),
    "LoRA": training(lora=LORA),
    "merged": training(lora=LORA, save=SaveRecipe(merge=True)),
    "merged for Hugging Face": training(lora=LORA, save=replace(HF, merge=True)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_writer_carries_the_template(sources, tmp_path, kind):
    source = sources[kind]
    expected = answers(source.path, template=source.template)
    for name, write in WRITERS.items():
        write(source, tmp_path / name)
        same(answers(tmp_path / name), expected)


@pytest.mark.parametrize("name", ["export", "LoRA"])
def test_a_chat_template_is_carried_into_the_originals_layout(sources, tmp_path, name):
    source = sources["processor_config.json"]
    WRITERS[name](source, tmp_path / "out")
    same(answers(tmp_path / "out"), answers(source.path))
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["lapilli_template"] == "chat_template"
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == WITH_SYSTEM


@pytest.mark.parametrize(
    "kind", ["chat_template.jinja", "chat_template.jinja, template named", "exported"]
)
def test_an_adapter_for_peft_carries_the_template(sources, tmp_path, kind):
    source = sources[kind]
    training(lora=LORA, save=HF)(source, tmp_path / "out")
    expected = answers(source.path, template=source.template)
    same(answers(tmp_path / "out"), expected)
    same(answers(source.path, adapter=str(tmp_path / "out")), expected)
    export_checkpoint(str(tmp_path / "out"), tmp_path / "folded")
    same(answers(tmp_path / "folded"), expected)


@pytest.mark.parametrize(
    "kind", ["original", "chat_template.jinja", "chat_template.jinja, template named", "exported"]
)
def test_quantize_carries_the_template(sources, tmp_path, kind):
    source = sources[kind]
    loaded = load_checkpoint(
        source.path, device="cpu", dtype=STORED, template=source.template, quantization="int8"
    )
    save_llava(
        tmp_path / "out",
        loaded.model,
        loaded.config,
        tokenizer_path=loaded.tokenizer_path,
        template=loaded.template.template,
        quantization=loaded.quantization,
    )
    expected = answers(source.path, template=source.template, quantize="int8")
    same(answers(tmp_path / "out"), expected)


@pytest.mark.parametrize("kind", ["original", "original, template named", "processor_config.json"])
def test_transformers_reads_the_same_ids_and_logits(sources, tmp_path, kind):
    source = sources[kind]
    exporting("huggingface")(source, tmp_path / "out")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype="float32").eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "out", backend="pil")
    image_id = model.config.image_token_id
    chat = lapilli.load(str(source.path), device="cpu", dtype="float32", template=source.template)
    for name, messages in CONVERSATIONS.items():
        if name == "typed tokens":
            continue  # transformers takes a typed token for the token
        ready = chat.encode(messages)
        ids = list(ready.encoded.input_ids)
        for span in ready.encoded.spans:
            ids[span.start : span.start + span.length] = [image_id] * span.length
        inputs = processor_inputs(processor, messages)
        assert inputs["input_ids"][0].tolist() == ids, name
        with torch.inference_mode():
            batch = chat.model.embed_prompts([ready.encoded], [ready.media])
            expected = chat.model.logits(chat.model(batch))[0]
            found = model(**inputs).logits[0][:, : expected.shape[-1]]
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def processor_inputs(processor, messages):
    turns = [
        {
            "role": message.role,
            "content": [
                {"type": "image"}
                if isinstance(part, MediaPart)
                else {"type": "text", "text": part.text}
                for part in message.parts
            ],
        }
        for message in messages
    ]
    pictures = [part.source for message in messages for part in message.media]
    text = processor.apply_chat_template(turns, add_generation_prompt=True)
    begins = text.startswith(processor.tokenizer.bos_token)
    return processor(text=text, images=pictures, return_tensors="pt", add_special_tokens=not begins)


def test_number_formats_are_those_of_the_files(sources, tmp_path):
    """A run in bfloat16 leaves an adapter that is exported in the format of its base."""
    source = sources["chat_template.jinja"]  # float32
    training(lora=LORA, precision="bfloat16")(source, tmp_path / "lora")
    assert export_checkpoint(str(tmp_path / "lora"), tmp_path / "out") == "float32"
    assert load_checkpoint(tmp_path / "out", device="cpu").config.torch_dtype == "float32"
    same(answers(tmp_path / "out"), answers(source.path))


def test_a_float32_tower_stays_float32_beside_a_float16_language_model(sources, tmp_path):
    loaded = load_checkpoint(sources["original"].path, device="cpu", dtype=STORED)
    tower = {dtype for name, dtype in loaded.stored.items() if "vision_tower" in name}
    assert tower == {torch.float32}
    for layout in ("llava", "huggingface"):
        out = tmp_path / layout
        stored = export_checkpoint(str(sources["original"].path), out, layout=layout)
        assert stored == "float16 and float32"
        again = load_checkpoint(out, device="cpu", dtype=STORED)
        assert again.stored == loaded.stored
        assert again.config.torch_dtype == "float16"
    out = tmp_path / "asked"
    asked = export_checkpoint(
        str(sources["original"].path), out, layout="huggingface", dtype="bfloat16"
    )
    assert asked == "bfloat16"
    assert set(load_checkpoint(out, device="cpu", dtype=STORED).stored.values()) == {torch.bfloat16}
