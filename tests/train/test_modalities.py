"""Training with declared modalities: what learns, from what, and what comes out."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

import lapilli
from lapilli import Message, SamplingParams
from lapilli.calibration.samples import embed_samples, read_samples
from lapilli.checkpoint.load import load_checkpoint
from lapilli.errors import ConfigError, DataError, FusionError
from lapilli.prompt.encode import Span
from lapilli.store import StoreWriter
from lapilli.store.encode import TextEncoder, build_store
from lapilli.train.build import add_modalities
from lapilli.train.data.check import check
from lapilli.train.data.dataset import open_dataset
from lapilli.train.data.encoder import plan_encoder
from lapilli.train.distributed import SINGLE_PROCESS
from lapilli.train.launch import build_task, check_sharding, launch
from lapilli.train.recipe import (
    DataRecipe,
    LoraRecipe,
    ModelRecipe,
    OptimRecipe,
    Recipe,
    RunRecipe,
    SaveRecipe,
    SourceRecipe,
)
from lapilli.train.recipe.file import load_recipe, recipe_text
from lapilli.train.trainer.metrics import RunLog
from tests.modality.declared import DECLARED, tiny_language_model
from tests.train import cluster

COLOURS = ("red", "green", "blue", "grey")
USER = {"vec": {"kind": "vector", "width": 3}}


def records(count: int = 12) -> list[dict]:
    made = []
    for i in range(count):
        turns = [
            {"from": "human", "value": "<vec>\n<user>\nWhat colour does it like?"},
            {"from": "gpt", "value": COLOURS[i % 4]},
            {"from": "human", "value": "And of <item>?"},
            {"from": "gpt", "value": COLOURS[(i + 1) % 4]},
        ]
        made.append(
            {
                "id": f"r{i}",
                "vec": [float(i % 4 == k) for k in range(3)],
                "user": {"film": [i % 9 + 1, 3], "rating": [1, 2.5]},
                "item": f"A thing that is {COLOURS[i % 4]}.",
                "conversations": turns,
            }
        )
    return made


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Plain and declaring checkpoints, and data with every modality and with vectors alone."""
    root = tmp_path_factory.mktemp("learn")
    plain = tiny_language_model(root / "plain")
    add_modalities(str(plain), root / "all", DECLARED)
    (root / "all.json").write_text(json.dumps(records()))
    vectors = [
        {
            "id": one["id"],
            "vec": one["vec"],
            "conversations": [
                {"from": "human", "value": "<vec>\nWhat colour?"},
                one["conversations"][1],
            ],
        }
        for one in records()
    ]
    (root / "vec.json").write_text(json.dumps(vectors))
    return root


def recipe(root: Path, checkpoint: str, data: str = "all", **changes) -> Recipe:
    model, run = changes.pop("model", {}), changes.pop("run", {})
    given = {
        "stage": "instruct",
        "optim": OptimRecipe(lr=3e-3),
        "run": RunRecipe(**{"batch_size": 4, "steps": 3, "log_every": 1, "plot": False, **run}),
        "model": ModelRecipe(checkpoint=str(root / checkpoint), **model),
        "data": DataRecipe(
            sources=(SourceRecipe(path=str(root / f"{data}.json")),), template="vicuna_v1"
        ),
    }
    return Recipe(**{**given, **changes})


def learning(task) -> set[str]:
    return {n for n, p in task.model.vlm.named_parameters() if p.requires_grad}


def test_align_trains_the_projectors_of_all_modalities(root):
    task = build_task(recipe(root, "all", stage="align"), SINGLE_PROCESS)
    names = learning(task)
    assert {name.split(".")[1] for name in names} == {"user", "item", "vec"}
    assert all(".projector." in name for name in names)
    assert not task.model.vlm.modality("user").encoder.training
    assert task.model.vlm.modality("user").projector.training


def test_an_encoder_learns_where_it_is_named(root):
    asked = recipe(root, "all", stage="align", model={"tune_encoder": ("user",)})
    task = build_task(asked, SINGLE_PROCESS)
    assert any(name.startswith("modalities.user.encoder.tables") for name in learning(task))
    assert not any(name.startswith("modalities.item.encoder") for name in learning(task))
    assert task.model.vlm.modality("user").encoder.training
    frozen = recipe(root, "all", model={"freeze": ("modalities.vec.",)})
    assert not any(
        name.startswith("modalities.vec.") for name in learning(build_task(frozen, SINGLE_PROCESS))
    )


@pytest.mark.parametrize(
    ("names", "match"),
    [
        (("vec",), "model.tune_encoder names 'vec': the modalities with an encoder are user, item"),
        (("image",), "the tower of pictures is model.tune_tower"),
    ],
)
def test_what_has_no_encoder(root, names, match):
    with pytest.raises(ConfigError, match=match):
        build_task(recipe(root, "all", model={"tune_encoder": names}), SINGLE_PROCESS)


def test_gradients_reach_both_sides_and_a_step_moves_the_loss(root):
    asked = recipe(root, "all", model={"tune_encoder": ("user", "item")}, run={"batch_size": 12})
    task = build_task(asked, SINGLE_PROCESS)
    batch, count = task.batch(0, 0)
    assert {span.modality for span in batch.spans} == {"vec", "user", "item"}
    assert len(batch.spans) == 36
    first = task.loss(batch).total / count
    first.backward()
    parts = ("language_model.model.layers.0", "language_model.model.embed_tokens")
    parts += (
        "modalities.vec.projector.0",
        "modalities.user.projector",
        "modalities.item.projector",
    )
    parts += ("modalities.user.encoder.tables.0", "modalities.item.encoder.model.layers.0")
    for part in parts:
        found = [p.grad for n, p in task.model.vlm.named_parameters() if n.startswith(part)]
        assert found, part
        assert all(grad is not None and bool(grad.abs().sum() > 0) for grad in found), part
    before = task.model.vlm.modality("vec").projector[0].weight.detach().clone()
    with torch.no_grad():
        for parameter in task.model.vlm.parameters():
            if parameter.grad is not None:
                parameter -= 0.05 * parameter.grad
    assert not torch.equal(before, task.model.vlm.modality("vec").projector[0].weight)
    assert float(task.loss(batch).total.detach() / count) < float(first.detach())


def test_one_vector_too_many_is_counted(root):
    task = build_task(recipe(root, "all", "vec"), SINGLE_PROCESS)
    batch, _ = task.batch(0, 0)
    first = batch.spans[0]
    object.__setattr__(
        batch, "spans", (Span(first.row, first.start, first.length - 1, "vec"), *batch.spans[1:])
    )
    with pytest.raises(FusionError, match="the span has 1 positions of width 48, the features are"):
        task.loss(batch)


def losses(folder: Path) -> list[float]:
    return [record["loss"] for record in RunLog(folder).records() if "loss" in record]


def answer(folder: Path, **media) -> tuple[int, ...]:
    chat = lapilli.load(str(folder), device="cpu", dtype="float32")
    question = [Message.user("What colour?", **media)]
    return chat.answer(question, SamplingParams(max_new_tokens=4)).token_ids


@pytest.mark.parametrize("layout", ["llava", "huggingface"])
@pytest.mark.parametrize("stage", ["align", "instruct"])
def test_a_run_on_a_plain_language_model(root, stage, layout, tmp_path):
    """A fresh modality of the recipe, trained, saved and asked."""
    asked = recipe(
        root,
        "plain",
        "vec",
        stage=stage,
        model={"modalities": USER},
        run={"steps": 8},
        save=SaveRecipe(layout=layout),
    )
    task = launch(asked, tmp_path / "run", parallel=SINGLE_PROCESS)
    found = losses(tmp_path / "run")
    assert found[-1] < found[0]
    loaded = load_checkpoint(tmp_path / "run" / "model", device="cpu", dtype="float32")
    for name, tensor in task.model.vlm.modality("vec").state_dict().items():
        assert torch.equal(tensor, loaded.model.modality("vec").state_dict()[name])
    assert answer(tmp_path / "run" / "model", vec=[1.0, 0.0, 0.0])


def test_the_second_stage_begins_with_the_projector_of_the_first(root, tmp_path):
    align = recipe(root, "plain", "vec", stage="align", model={"modalities": USER})
    task = launch(align, tmp_path / "align", parallel=SINGLE_PROCESS)
    trained = task.model.vlm.modality("vec").state_dict()
    by_key = {"modalities": USER, "projector": str(tmp_path / "align")}
    second = build_task(recipe(root, "plain", "vec", model=by_key), SINGLE_PROCESS)
    third = build_task(recipe(tmp_path, "align/model", str(root / "vec")), SINGLE_PROCESS)
    for other in (second, third):
        state = other.model.vlm.modality("vec").state_dict()
        assert all(torch.equal(trained[name], tensor) for name, tensor in state.items())


def test_an_adapter_carries_the_modality(root, tmp_path):
    lora = LoraRecipe(rank=2, alpha=4.0)
    asked = recipe(root, "plain", "vec", model={"modalities": USER}, lora=lora)
    task = launch(asked, tmp_path / "run", parallel=SINGLE_PROCESS)
    loaded = load_checkpoint(tmp_path / "run" / "model", device="cpu", dtype="float32")
    assert [name for name, _ in loaded.config.modalities] == ["vec"]
    for name, tensor in task.model.vlm.modality("vec").state_dict().items():
        assert torch.equal(tensor, loaded.model.modality("vec").state_dict()[name])
    peft = recipe(
        root,
        "plain",
        "vec",
        model={"modalities": USER},
        lora=lora,
        save=SaveRecipe(layout="huggingface"),
    )
    with pytest.raises(ConfigError, match="a PEFT adapter cannot carry the modality 'vec'"):
        launch(peft, tmp_path / "peft", parallel=SINGLE_PROCESS)


def test_pictures_and_vectors_in_one_run(root, tmp_path):
    Image.new("RGB", (40, 40), "tomato").save(tmp_path / "a.png")
    turns = [
        {"from": "human", "value": "<vec>\n<image>\nWhat colour?"},
        {"from": "gpt", "value": "red"},
    ]
    text = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    rows = [
        {"image": "a.png", "vec": [1, 2, 3], "conversations": turns},
        {"vec": [0, 0, 1], "conversations": [{"from": "human", "value": "<vec>?"}, turns[1]]},
        {"conversations": text},
    ]
    (tmp_path / "mixed.json").write_text(json.dumps(rows))
    add_modalities("pebble", tmp_path / "pebble", USER)
    asked = recipe(tmp_path, "pebble", "mixed", run={"batch_size": 3, "steps": 1})
    task = build_task(asked, SINGLE_PROCESS)
    batch, _ = task.batch(0, 0)
    assert sorted(span.modality for span in batch.spans) == ["image", "vec", "vec"]
    task.loss(batch).total.backward()
    assert float(task.model.vlm.modality("vec").projector[0].weight.grad.abs().sum()) > 0
    assert float(task.model.vlm.modality("image").projector[0].weight.grad.abs().sum()) > 0
    alone = recipe(tmp_path, "pebble", "mixed", run={"batch_size": 1})
    for step in range(3):  # a batch without a modality leaves it a gradient of zero
        task = build_task(alone, SINGLE_PROCESS)
        batch, _ = task.batch(step, 0)
        task.loss(batch).total.backward()
        grad = task.model.vlm.modality("vec").projector[0].weight.grad
        assert grad is not None
        assert bool(grad.abs().sum() > 0) is any(span.modality == "vec" for span in batch.spans)


def test_a_recipe_file_declares_modalities(root, tmp_path):
    text = f"""stage = "instruct"
[model]
checkpoint = "{root / "plain"}"
tune_encoder = ["user"]
[model.modalities.user]
kind = "events"
categorical = [{{ name = "film", size = 9, width = 4 }}]
hidden_size = 8
num_heads = 1
[data]
sources = [{{ path = "{root / "vec.json"}" }}]
[optim]
lr = 1e-3
[run]
batch_size = 2
"""
    (tmp_path / "r.toml").write_text(text)
    read = load_recipe(tmp_path / "r.toml", ["--model.modalities.user.max_events", "7"])
    assert read.model.modalities["user"]["max_events"] == 7
    (tmp_path / "again.toml").write_text(recipe_text(read))
    assert load_recipe(tmp_path / "again.toml") == read


@pytest.mark.parametrize(
    ("modalities", "match"),
    [
        ({"vec": {"kind": "vector", "width": 5}}, "says .* and the checkpoint has"),
        ({"new": {"kind": "vector", "wide": 5}}, r"lapilli_modalities\.new has a key 'wide'"),
        ({"new": 3}, r"lapilli_modalities\.new must be an object, got 3"),
        ({"vec": 3}, r"lapilli_modalities\.vec must be an object, got 3"),
    ],
)
def test_modalities_that_the_recipe_cannot_have(root, modalities, match):
    with pytest.raises(ConfigError, match=match):
        build_task(recipe(root, "all", model={"modalities": modalities}), SINGLE_PROCESS)


def test_the_same_settings_keep_the_weights_of_the_checkpoint(root):
    asked = recipe(root, "all", model={"modalities": {"vec": DECLARED["vec"]}})
    task = build_task(asked, SINGLE_PROCESS)
    stored = load_checkpoint(root / "all", device="cpu").model.modality("vec").state_dict()
    state = task.model.vlm.modality("vec").state_dict()
    assert all(torch.equal(stored[name], tensor) for name, tensor in state.items())


def test_a_model_that_reads_text_only_is_told_what_to_do(root):
    with pytest.raises(ConfigError, match=r"or a modality with \[model\.modalities\.NAME\]"):
        build_task(recipe(root, "plain", "vec"), SINGLE_PROCESS)


def test_a_resampler_in_pieces_is_refused(root, tmp_path):
    resampler = {"new": {"kind": "vector", "width": 3, "projector": "resampler2"}}
    add_modalities(str(root / "plain"), tmp_path / "out", resampler)
    with pytest.raises(ConfigError, match="\"fsdp\" and the modality 'new' has a resampler"):
        check_sharding(load_checkpoint(tmp_path / "out", device="cpu"))
    check_sharding(load_checkpoint(root / "all", device="cpu"))


def test_data_check_reads_declared_media(root, tmp_path):
    rows = records(3)
    rows[1]["vec"] = [1.0, 2.0]
    (tmp_path / "d.json").write_text(json.dumps(rows))
    dataset = open_dataset((SourceRecipe(path=str(tmp_path / "d.json")),))
    encoder = plan_encoder(root / "all").encoder
    report = check(dataset, encoder=encoder)
    [found] = report.errors
    assert found.kind == "medium"
    assert "r1" in str(found)
    assert "vec: expected [n, 3] or [3] numbers" in str(found)
    assert report.positions is not None
    assert report.num_media == 9
    with pytest.raises(DataError, match=r"d\.json.*vec: expected"):
        encoder.encode(dataset.declaring(encoder.modalities).sample(1))


def test_calibration_samples_show_declared_media(root):
    loaded = load_checkpoint(root / "all", device="cpu")
    samples = read_samples(str(root / "all.json"), 2, loaded)
    assert [span.modality for span in samples[0].prompt.spans] == ["vec", "user", "item"]
    first, _ = embed_samples(loaded.model, samples, torch.device("cpu"))
    assert int(first.is_picture.sum()) == sum(span.length for span in samples[0].prompt.spans)


def test_ids_of_stores_learn_what_their_media_learn(root, tmp_path):
    """Vectors of a `vec`, and the features of a text's frozen encoder, stand in stores."""
    model = load_checkpoint(root / "all", device="cpu", dtype="float32")
    rows = records()
    with StoreWriter(tmp_path / "vec", encoder="e", dtype="float32") as writer:
        writer.add([row["id"] for row in rows], torch.tensor([[row["vec"]] for row in rows])[:, 0])
    encoder = TextEncoder(model.model, model.tokenizer, modality="item")
    texts = sorted({row["item"] for row in rows})
    build_store(tmp_path / "item", zip(texts, texts, strict=True), encoder, dtype="float32")
    for row in rows:
        row["vec"] = row["id"]
    (tmp_path / "ids.json").write_text(json.dumps(rows))
    stores = {name: str(tmp_path / name) for name in ("vec", "item")}
    ids = (SourceRecipe(path=str(tmp_path / "ids.json")),)
    frozen = {"run": {"steps": 1}, "model": {"freeze": ("modalities.item.",)}}
    plain = recipe(root, "all", **copy.deepcopy(frozen))
    stored = recipe(root, "all", **frozen)
    stored = replace(stored, data=replace(stored.data, sources=ids, stores=stores))
    made = [build_task(one, SINGLE_PROCESS) for one in (plain, stored)]
    expected, found = (task.loss(task.batch(0, 0)[0]).total for task in made)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    before = made[1].fingerprint()["data.stores.vec"]
    with StoreWriter(tmp_path / "vec", encoder="e", dtype="float32") as writer:
        writer.add(["r0"], torch.ones(1, 3))
    assert made[1].fingerprint()["data.stores.vec"] != before
    rows[0]["vec"] = "nobody"
    (tmp_path / "ids.json").write_text(json.dumps(rows))
    with pytest.raises(DataError, match=r"r0.*vec: .*'nobody'"):
        build_task(stored, SINGLE_PROCESS).samples.sample(0)


@pytest.mark.cluster
@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_two_processes_learn_what_one_learns(root, tmp_path, sharding):
    """Batches of one sample each, of which some show a user, some a text and some nothing."""
    rows = records(8)
    for i, row in enumerate(rows):
        shown = ("vec", "user", "item", "")[i % 4]
        row["conversations"] = [
            {"from": "human", "value": f"<{shown}>\nWell?" if shown else "Well?"},
            row["conversations"][1],
        ]
        for name in DECLARED.keys() - {shown}:
            del row[name]
    (tmp_path / "mixed.json").write_text(json.dumps(rows))
    run = {"batch_size": 1, "gradient_accumulation_steps": 4, "steps": 4}
    asked = recipe(
        tmp_path,
        str(root / "all"),
        "mixed",
        model={"tune_encoder": ("user", "item")},
        run={**run, "sharding": sharding},
    )
    task = launch(asked, tmp_path / "alone" / "run", parallel=SINGLE_PROCESS)
    answers = cluster.together(cluster.run_recipe, 2, tmp_path / "two", asked)
    assert answers == [None, None]
    found, expected = (losses(tmp_path / name / "run") for name in ("two", "alone"))
    assert found == pytest.approx(expected, abs=1e-4)
    state = task.model.vlm.state_dict()
    saved = load_checkpoint(tmp_path / "two" / "run" / "model", device="cpu", dtype="float32")
    for name, tensor in saved.model.state_dict().items():
        torch.testing.assert_close(tensor, state[name], atol=2e-4, rtol=1e-3)


BESIDE = {"vec": {**USER["vec"], "fusion": "cross_attention", "every": 1}}


@pytest.mark.parametrize("form", ["align", "instruct", "lora", "merged"])
def test_gated_blocks_learn_with_the_projectors(root, form, tmp_path):
    """In every stage, and are asked from what comes out; an adapter leaves them alone."""
    lora = LoraRecipe(rank=4) if form in ("lora", "merged") else None
    asked = recipe(
        root,
        "plain",
        "vec",
        stage="align" if form == "align" else "instruct",
        lora=lora,
        model={"modalities": BESIDE},
        run={"steps": 8, "batch_size": 6},
        optim=OptimRecipe(lr=2e-2),
        save=SaveRecipe(merge=form == "merged"),
    )
    task = build_task(asked, SINGLE_PROCESS)
    blocks = {n for n, _ in task.model.vlm.named_parameters() if "cross_attention" in n}
    assert len(blocks) == 2 * 11
    assert blocks <= learning(task)
    if form == "align":
        assert all("cross_attention" in n or ".projector." in n for n in learning(task))
    assert not any("lora" in name for name in blocks)
    launch(asked, tmp_path / "run", parallel=SINGLE_PROCESS)
    found = losses(tmp_path / "run")
    assert found[-1] < found[0]
    out = tmp_path / "run" / "model"
    loaded = load_checkpoint(out, device="cpu", dtype="float32")
    gates = [p for n, p in loaded.model.named_parameters() if n.endswith("_gate")]
    assert len(gates) == 4
    assert all(gate.abs() > 1e-3 for gate in gates)
    chat = lapilli.load(str(out), device="cpu", dtype="float32")
    question = [[Message.user("What colour?", vec=[*v])] for v in ([1, 0, 0], [0, 0, 1])]
    prompts = [chat.encode(one) for one in question]
    assert [span.length for prompt in prompts for span in prompt.encoded.spans] == [0, 0]
    first, other = (
        chat.model(chat.model.embed_prompts([p.encoded], [p.media]))[0, -1] for p in prompts
    )
    assert not torch.allclose(first, other)
    assert answer(out, vec=[1.0, 0, 0])


def test_a_projector_of_align_lies_over_the_blocks(root, tmp_path):
    asked = recipe(
        root, "plain", "vec", stage="align", model={"modalities": BESIDE}, run={"steps": 2}
    )
    launch(asked, tmp_path / "run", parallel=SINGLE_PROCESS)
    again = recipe(
        root,
        "plain",
        "vec",
        model={"modalities": BESIDE, "projector": str(tmp_path / "run")},
    )
    found = build_task(again, SINGLE_PROCESS).model.vlm.state_dict()
    expected = load_checkpoint(tmp_path / "run" / "model", device="cpu", dtype="float32")
    for name, tensor in expected.model.state_dict().items():
        if "cross_attention" in name or "modalities" in name:
            assert torch.equal(found[name], tensor), name


def test_a_soft_prompt_is_k_positions_at_the_place_of_the_medium(root, tmp_path):
    """User-LLM's soft prompt: fusion by tokens, with a fixed number of them."""
    soft = {"vec": {"kind": "vector", "width": 3, "tokens": 4}}
    add_modalities(str(root / "plain"), tmp_path / "soft", soft)
    chat = lapilli.load(str(tmp_path / "soft"), device="cpu")
    prompt = chat.encode([Message.user("What colour?", vec=[1.0, 0, 0])])
    [span] = prompt.encoded.spans
    assert span.length == 4
    batch = chat.model.embed_prompts([prompt.encoded], [prompt.media])
    [features] = chat.model.modality("vec").embed(prompt.media)
    assert torch.equal(batch.inputs_embeds[0, span.start : span.start + 4], features)
    assert batch.memory is None
