"""Chat on golden checkpoints: conversations, features, batches, refusals."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

import lapilli
from lapilli import (
    Chat,
    CheckpointError,
    ContextTooLongError,
    GenerationError,
    MediaError,
    Message,
    MissingFileError,
    PromptError,
    SamplingParams,
    UnsupportedModelError,
)
from lapilli.checkpoint.out_of_distribution import fit_detector, save_detector
from lapilli.generate.engine import EngineOptions

Load = Callable[..., Chat]
FEW = {"max_new_tokens": 8}


@pytest.fixture(scope="module")
def paths(
    conformance: Path, maker: ModuleType, tmp_path_factory
) -> Callable[[str], dict[str, str]]:
    """Paths of a golden checkpoint, made when it is first asked for."""
    made: dict[str, dict[str, str]] = {}

    def make(variant: str) -> dict[str, str]:
        if variant not in made:
            found = next((conformance / "cases").glob(f"*/{variant}/spec.json"))
            out = str(tmp_path_factory.mktemp(variant))
            text = json.loads(found.read_text())
            made[variant] = maker.build(text, out, None, str(conformance / "assets"))
        return made[variant]

    return make


@pytest.fixture(scope="module")
def loaded(paths) -> Load:
    """Chats of a module share their model and begin empty."""
    kept: dict[str, Chat] = {}

    def load(variant: str) -> Chat:
        if variant not in kept:
            made = paths(variant)
            kept[variant] = lapilli.load(
                made["model_path"], base=made["model_base"], device="cpu", dtype="float32"
            )
        chat = kept[variant]
        chat.reset()
        chat.system = None
        return chat

    return load


@pytest.fixture
def chat(loaded: Load) -> Chat:
    return loaded("llava-v1.5-tiny-pad")


@pytest.fixture
def drawing(tmp_path: Path) -> str:
    pixels = np.linspace(0, 255, 60 * 40 * 3).reshape(40, 60, 3).astype(np.uint8)
    path = tmp_path / "drawing.png"
    Image.fromarray(pixels).save(path)
    return str(path)


class Calls:
    """Counts the calls of a method."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, owner: object, name: str) -> None:
        self.count = 0
        method = getattr(owner, name)

        def counted(*args: object, **options: object) -> object:
            self.count += 1
            return method(*args, **options)

        monkeypatch.setattr(owner, name, counted)


VARIANTS = ["llava-v1.5-tiny-pad", "llava-v1.6-vicuna-tiny-336", "llava-v1.6-mistral-tiny"]


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_conversation(loaded: Load, variant: str, drawing: str):
    chat = loaded(variant)
    first = chat.ask("What is shown?", drawing, **FEW)
    assert first == chat.last.text.strip()
    assert len(chat.last.token_ids) == 8
    pieces = list(chat.stream("And what is left of it?", **FEW))
    assert "".join(pieces) == chat.last.text
    assert [message.role for message in chat.history] == ["user", "assistant"] * 2
    assert chat.history[0].media[0].source == drawing
    assert [m.text for m in chat.history[:3]] == [
        "What is shown?",
        first,
        "And what is left of it?",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_kept_changes_no_answer(loaded: Load, variant: str, drawing: str):
    """Kept features and KV cache against everything computed anew."""
    chat = loaded(variant)
    for question, images in [("What is shown?", (drawing,)), ("Where?", ()), ("Sure?", ())]:
        chat.ask(question, *images, **FEW)
        kept = chat.last
        whole = chat.history[:-1]
        fresh = chat.answer(
            [Message(message.role, message.parts) for message in whole],
            SamplingParams(**FEW),
        )
        assert (fresh.token_ids, fresh.prompt_len) == (kept.token_ids, kept.prompt_len)


@pytest.mark.slow
def test_the_image_is_encoded_once(chat: Chat, drawing: str, monkeypatch):
    chat.engine.reset_cache()  # other tests have shown it
    tower = Calls(monkeypatch, chat.model.modalities["image"].vision_tower, "forward")
    chat.ask("What is shown?", drawing, **FEW)
    chat.ask("Where?", **FEW)
    list(chat.stream("Why?", **FEW))
    assert tower.count == 1
    chat.ask("And here?", drawing, keep=True, **FEW)  # the same once more
    assert tower.count == 1
    chat.ask("And now?", np.zeros((9, 9, 3), dtype=np.uint8), keep=True, **FEW)
    assert tower.count == 2
    chat.ask("Which is brighter?", **FEW)
    assert tower.count == 2
    chat.reset()
    chat.ask("What is shown?", drawing, **FEW)  # another conversation
    chat.batch([[Message.user("Who?", drawing)]], SamplingParams(**FEW))
    assert tower.count == 2


def test_the_beginning_of_a_conversation_is_read_once(chat: Chat, drawing: str, monkeypatch):
    chat.engine.reset_cache()
    read: list[int] = []
    forward = chat.model.language_model.forward

    def watched(inputs_embeds: torch.Tensor, **options: object) -> torch.Tensor:
        read.append(inputs_embeds.shape[1])
        return forward(inputs_embeds, **options)

    monkeypatch.setattr(chat.model.language_model, "forward", watched)
    chat.ask("What is shown?", drawing, max_new_tokens=1)
    first = chat.last.prompt_len
    assert read == [first]
    chat.ask("Where?", max_new_tokens=1)
    assert len(read) == 2
    # All but the new turn came from the cache, though the prompt grew.
    assert read[1] < chat.last.prompt_len - first + 4
    assert chat.last.prompt_len > first


@pytest.mark.slow
def test_images_begin_anew_unless_kept(chat: Chat, drawing: str):
    chat.ask("One?", drawing, **FEW)
    chat.ask("Two?", drawing, **FEW)
    assert [m.text for m in chat.history if m.role == "user"] == ["Two?"]
    one_picture = chat.last.prompt_len
    chat.ask("Three?", drawing, keep=True, **FEW)
    assert [m.text for m in chat.history if m.role == "user"] == ["Two?", "Three?"]
    assert chat.last.prompt_len > one_picture + 16  # the second picture takes 16 positions
    chat.reset()
    assert chat.history == ()
    assert chat.last is None


def test_two_images_in_one_question(chat: Chat, drawing: str):
    ready = chat.encode([Message.user("Which?", drawing, drawing)])
    assert len(ready.media) == len(ready.encoded.spans) == 2
    assert ready.encoded.spans[0].length == ready.encoded.spans[1].length
    chat.ask("Which?", drawing, drawing, **FEW)
    assert chat.last.prompt_len == len(ready.encoded.input_ids)


def test_a_typed_placeholder_stays_text(chat: Chat, drawing: str):
    typed = chat.encode([Message.user("Is <image> here </s>?", drawing)])
    assert len(typed.encoded.spans) == 1
    assert chat.tokenizer.eos_id not in typed.text_ids
    assert "<image>" in chat.tokenizer.decode(typed.text_ids)
    chat.ask("<image>", **FEW)
    assert chat.history[0].text == "<image>"
    assert chat.history[0].media == ()


def test_the_image_stands_first(chat: Chat, drawing: str):
    ready = chat.encode([Message.user("Q", drawing)])
    [span] = ready.encoded.spans
    after = chat.tokenizer.decode(ready.encoded.input_ids[span.start + span.length :])
    assert after.startswith("\nQ")


@pytest.mark.slow
def test_sources_of_a_picture(chat: Chat, drawing: str):
    picture = Image.open(drawing)
    sources = [drawing, Path(drawing), Path(drawing).read_bytes(), picture, np.asarray(picture)]
    answers = {chat.ask("What?", source, **FEW) for source in sources}
    [ready] = chat.encode([Message.user("What?", drawing)]).media
    answers.add(chat.ask("What?", ready, **FEW))
    with torch.inference_mode():
        image = chat.model.modality("image")
        [features] = image.embed([ready])
        tower = image.vision_tower(ready.pixel_values)[0]
    assert tower.shape[1] != features.shape[1]
    answers |= {chat.ask("What?", features, **FEW), chat.ask("What?", tower, **FEW)}
    assert len(answers) == 1


@pytest.mark.parametrize(
    "features",
    [torch.zeros(4, 5), torch.zeros(0, 64), torch.zeros(64), torch.zeros(4, 64).long()],
)
def test_features_of_another_shape(chat: Chat, features: torch.Tensor):
    width = chat.config.text.hidden_size
    with pytest.raises(MediaError, match=rf"floating point \[n, {width}\] .* got torch"):
        chat.ask("What?", features)


@pytest.mark.parametrize("question", ["", "  \n"])
def test_empty_question(chat: Chat, question):
    with pytest.raises(PromptError, match="the question is empty: ask something"):
        chat.ask(question)
    assert chat.history == ()


@pytest.mark.slow
def test_a_failing_question_leaves_the_conversation_alone(chat: Chat, drawing: str, tmp_path: Path):
    chat.ask("What?", drawing, **FEW)
    before = chat.history
    with pytest.raises(MediaError, match=r"no-such-file\.png"):
        chat.ask("And?", str(tmp_path / "no-such-file.png"))
    with pytest.raises(GenerationError, match="unknown sampling option temprature"):
        chat.ask("And?", temprature=1)
    assert chat.history == before
    chat.ask("And?", **FEW)
    assert len(chat.history) == 4


@pytest.mark.slow
def test_too_long(chat: Chat, drawing: str):
    with pytest.raises(ContextTooLongError, match=r"tokens, 16 of them visual tokens.*shorten"):
        chat.ask("why " * 6000, drawing)
    with pytest.raises(ContextTooLongError, match="the prompt of row 1"):
        chat.batch([[Message.user("Hi")], [Message.user("why " * 6000)]])


@pytest.mark.slow
def test_text_only_model(paths, drawing: str):
    chat = lapilli.load(paths("llava-v1.5-tiny-lora")["model_base"], device="cpu", dtype="float32")
    assert chat.ask("Who?", **FEW) == chat.last.text.strip()
    with pytest.raises(UnsupportedModelError, match="cannot take an image, it reads text only"):
        chat.ask("What?", drawing)
    with pytest.raises(UnsupportedModelError, match="text only"):
        chat.check_image(drawing)


def test_check_image(chat: Chat, drawing: str, tmp_path: Path):
    chat.check_image(drawing)
    (tmp_path / "empty.png").touch()
    with pytest.raises(MediaError, match="empty"):
        chat.check_image(str(tmp_path / "empty.png"))
    assert chat.history == ()


@pytest.mark.slow
def test_stopping_keeps_what_was_said(chat: Chat, drawing: str, monkeypatch):
    pieces = chat.stream("What?", drawing, max_new_tokens=30)
    said = next(pieces) + next(pieces)
    steps = Calls(monkeypatch, chat.model.language_model, "forward")
    pieces.close()
    assert steps.count == 0
    assert chat.last.finish_reason == "cancelled"
    assert chat.last.text.startswith(said)
    assert chat.history[-1].text == chat.last.text.strip()
    # The next answer is the one that a conversation with this history gets anew.
    chat.ask("Go on", **FEW)
    fresh = chat.answer(chat.history[:-1], SamplingParams(**FEW))
    assert fresh.token_ids == chat.last.token_ids


@pytest.mark.slow
def test_an_interrupt_does_not_leave_a_torn_cache(chat: Chat, drawing: str, monkeypatch):
    pieces = chat.stream("What?", drawing, max_new_tokens=30)
    next(pieces)
    layer = chat.model.language_model.model.layers[-1]

    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(layer, "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            next(pieces)
    assert chat.last.finish_reason == "cancelled"
    chat.ask("Go on", **FEW)
    fresh = chat.answer(chat.history[:-1], SamplingParams(**FEW))
    assert fresh.token_ids == chat.last.token_ids


@pytest.mark.slow
def test_two_streams_at_once(chat: Chat, drawing: str):
    chat.ask("What?", drawing, **FEW)
    before = chat.history
    one, two = chat.stream("Who?", **FEW), chat.stream("Where?", **FEW)
    texts = [next(one), next(two)]
    texts[0] += "".join(one)
    texts[1] += "".join(two)
    for question, text in zip(("Who?", "Where?"), texts, strict=True):
        fresh = chat.answer((*before, Message.user(question)), SamplingParams(**FEW))
        assert text == fresh.text


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"temperature": 1.0, "seed": 4}])
def test_a_batch_of_all_kinds(chat: Chat, drawing: str, options):
    conversations = [
        [Message.user("What is shown here, and why?", drawing)],
        [Message.user("Who?")],
        [Message.user("Which?", drawing, drawing)],
        [Message.user("Who?"), Message.assistant("Me."), Message.user("When?", drawing)],
    ]
    params = SamplingParams(max_new_tokens=6, **options)
    together = chat.batch(conversations, params)
    alone = [chat.answer(messages, params) for messages in conversations]
    assert [a.token_ids for a in together] == [a.token_ids for a in alone]
    assert [a.prompt_len for a in together] == [a.prompt_len for a in alone]
    assert chat.history == ()
    assert chat.batch([]) == []
    with pytest.raises(PromptError, match="the conversation is empty"):
        chat.batch([conversations[0], []])


@pytest.mark.slow
def test_a_narrow_model_says_what_it_knows(paths, drawing: str, tmp_path: Path, monkeypatch):
    folder = tmp_path / "narrow"
    shutil.copytree(paths("llava-v1.5-tiny-pad")["model_path"], folder)
    chat = lapilli.load(str(folder), device="cpu", dtype="float32")
    answer = chat.ask("What?", drawing, **FEW)
    assert chat.out_of_distribution() is None  # it claims nothing
    with torch.inference_mode():
        [prepared] = chat.encode([Message.user("What?", drawing)]).media
        known = chat.model.modality("image").tower_features(prepared.pixel_values).flatten(0, 1)
    save_detector(fit_detector([known + 0.01 * i for i in range(4)], knows="It knows one."), folder)
    chat = lapilli.load(str(folder), device="cpu", dtype="float32")
    modality = chat.model.modalities["image"]
    tower = Calls(monkeypatch, modality.vision_tower, "forward")
    embed = Calls(monkeypatch, modality, "embed")
    assert chat.ask("What?", drawing, **FEW) == answer
    assert (embed.count, tower.count) == (1, 1)  # as of any checkpoint
    assert chat.out_of_distribution() is None
    assert (embed.count, tower.count) == (1, 2)
    noise = np.random.default_rng(0).integers(0, 256, (50, 50, 3), dtype=np.uint8)
    chat.ask("What?", noise, **FEW)
    assert "narrow was made for: It knows one. Load a LLaVA" in chat.out_of_distribution()
    chat.ask("Why?", **FEW)
    assert chat.out_of_distribution() is None  # said once, not again at every question
    chat.ask("Why?", drawing, noise, keep=True, num_beams=2, **FEW)
    assert "It knows one." in chat.out_of_distribution()  # after beams, which use no engine
    chat.reset()
    assert chat.out_of_distribution() is None


@pytest.mark.slow
def test_a_model_says_that_it_is_not_sure(paths, drawing: str, tmp_path: Path):
    folder = tmp_path / "unsure"
    shutil.copytree(paths("llava-v1.5-tiny-pad")["model_path"], folder)
    chat = lapilli.load(str(folder), device="cpu", dtype="float32")
    answer = chat.ask("What?", drawing, **FEW)
    assert chat.doubt() is None  # the checkpoint does not say which answers are to be doubted
    assert chat.last.logprobs is None
    features = [torch.randn(4, chat.config.vision.hidden_size) for _ in range(8)]
    save_detector(fit_detector(features, knows="It knows one.", unsure_below=1.0), folder)
    chat = lapilli.load(str(folder), device="cpu", dtype="float32")
    assert chat.doubt() is None  # nothing was asked yet
    assert chat.ask("What?", drawing, **FEW) == answer
    assert "unsure is not sure of this answer: it gave it a probability of" in chat.doubt()
    assert chat.ask("What?", drawing, logprobs=2, **FEW) == answer
    assert len(chat.last.logprobs[0].top) == 2
    chat.ask("What?", drawing, num_beams=2, **FEW)
    assert chat.doubt() is None
    chat.reset()
    assert chat.doubt() is None


@pytest.mark.slow
def test_system_prompt(chat: Chat):
    chat.ask("Who?", **FEW)
    plain = chat.last.prompt_len
    chat.reset()
    chat.system = "Speak."
    chat.ask("Who?", **FEW)
    assert chat.last.prompt_len < plain
    messages = [Message.system("Speak."), Message.user("Who?")]
    assert chat.answer(messages, SamplingParams(**FEW)).token_ids == chat.last.token_ids
    assert [m.role for m in chat.history] == ["user", "assistant"]


@pytest.mark.slow
def test_the_template_ends_the_answer(paths):
    path = paths("llava-v1.5-tiny-pad")["model_path"]
    chat = lapilli.load(path, device="cpu", dtype="float32", template="llava_v0")
    assert chat.template.name == "llava_v0"
    free = chat.ask("Who?", max_new_tokens=12)
    # The same answer is cut where the template's separator would stand.
    middle = free[len(free) // 2 : len(free) // 2 + 3]
    chat.reset()
    chat.ask("Who?", max_new_tokens=12, stop=middle)
    assert chat.last.finish_reason == "stop"
    assert middle not in chat.last.text
    params = chat._params(SamplingParams(stop=("x",)))
    assert params.stop == ("x", "###")


@pytest.mark.slow
@pytest.mark.parametrize("merged", [True, False])
def test_a_lora_may_stay_beside_the_weights(paths, merged: bool):
    made = paths("llava-v1.5-tiny-lora")
    chat = lapilli.load(
        made["model_path"],
        base=made["model_base"],
        device="cpu",
        dtype="float32",
        merge_lora=merged,
    )
    assert any("lora_A" in name for name in chat.model.state_dict()) is not merged


def test_loading_says_how_far_it_is(paths):
    seen: list[tuple[int, int]] = []
    chat = lapilli.load(
        paths("llava-v1.5-tiny-pad")["model_path"],
        device="cpu",
        dtype="float32",
        progress=lambda done, total: seen.append((done, total)),
    )
    assert len(seen) == len(chat.report.used)
    assert seen == sorted(seen)
    assert len({total for _, total in seen}) == 1
    assert seen[-1][0] == seen[-1][1] > 0


def test_unknown_template(paths):
    path = paths("llava-v1.5-tiny-pad")["model_path"]
    with pytest.raises(PromptError, match=r"no template is called 'v7': choose from .*vicuna_v1"):
        lapilli.load(path, device="cpu", template="v7")


def test_properties(chat: Chat):
    assert chat.model is chat._loaded.model
    assert chat.config.vision is not None
    assert chat.tokenizer.eos_id == 2
    assert chat.report.missing == ()
    assert chat.template.name
    assert chat.out_of_distribution() is None


@pytest.mark.slow
def test_ask_many_answers_each_as_if_alone(chat: Chat, drawing: str):
    other = np.full((30, 40, 3), 200, dtype=np.uint8)
    asked = [("What?", drawing), "Who are you?", ("What?", other), ("Where?", drawing, other)]
    answers = chat.ask_many(asked, **FEW)
    assert chat.history == ()
    for each, answer in zip(asked, answers, strict=True):
        question, *images = (each,) if isinstance(each, str) else each
        chat.engine.reset_cache()
        assert chat.ask(question, *images, **FEW) == answer
        chat.reset()
    assert chat.ask_many([]) == []


@pytest.mark.slow
def test_as_completed_hands_out_what_is_wrong(chat: Chat, drawing: str):
    conversations = [
        [Message.user("What?", drawing)],
        [Message.user("What?", "missing.png")],
        [],
        [Message.user("Who?")],
        [Message.user("word " * 5000)],
    ]
    found = dict(chat.as_completed(iter(conversations), SamplingParams(**FEW)))
    assert sorted(found) == [0, 1, 2, 3, 4]
    assert isinstance(found[1], MediaError)
    assert isinstance(found[2], PromptError)
    assert isinstance(found[4], ContextTooLongError)
    assert found[0].text == chat.batch([conversations[0]], SamplingParams(**FEW))[0].text


@pytest.mark.slow
def test_beams_take_the_plain_loop(chat: Chat, drawing: str):
    params = SamplingParams(num_beams=2, **FEW)
    conversations = [[Message.user("What?", drawing)], [Message.user("Who?")], []]
    found = dict(chat.as_completed(conversations, params))
    assert found[0].score is not None
    assert found[0] == chat.batch(conversations[:1], params)[0]
    assert isinstance(found[2], PromptError)


@pytest.mark.slow
def test_saved_prefix_spares_the_tower_and_the_prompt(paths, drawing: str, tmp_path, monkeypatch):
    path, file = paths("llava-v1.5-tiny-pad")["model_path"], tmp_path / "seen.safetensors"
    first = lapilli.load(path, device="cpu", dtype="float32")
    with pytest.raises(CheckpointError, match="nothing to save yet"):
        first.save_prefix(file)
    first.ask("What is shown?", drawing, **FEW)
    assert first.save_prefix(file) == first.last.prompt_len + len(first.last.token_ids) - 1
    expected = first.ask("What is it?", drawing, **FEW)

    again = lapilli.load(path, device="cpu", dtype="float32", prefix=file)
    # Of the class: a forward of the tower's own would be a change of the model.
    tower = Calls(monkeypatch, type(again.model.modalities["image"].vision_tower), "forward")
    assert again.ask("What is it?", drawing, **FEW) == expected
    assert tower.count == 0
    assert again.engine.prefix_stats.cached_tokens > 16

    with pytest.raises(CheckpointError, match="was read by another model"):
        lapilli.load(path, device="cpu", dtype="bfloat16", prefix=file)
    with pytest.raises(CheckpointError, match="as float32, the engine keeps them as int8"):
        lapilli.load(
            path,
            device="cpu",
            dtype="float32",
            prefix=file,
            engine=EngineOptions(kv_dtype="int8"),
        )
    with pytest.raises(MissingFileError, match="no such file"):
        again.load_prefix(tmp_path / "nothing")
    broken = tmp_path / "broken"
    broken.write_bytes(b"no tensors")
    with pytest.raises(CheckpointError, match="not a saved prefix"):
        again.load_prefix(broken)
