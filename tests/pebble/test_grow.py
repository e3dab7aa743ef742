"""A grown model begins as the smaller one's function, and its copies can part."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lapilli.config.model import DecoderConfig
from lapilli.errors import ConfigError
from lapilli.lm.decoder import Decoder
from lapilli.modality.projector import build_projector
from lapilli.model import VisionLanguageModel
from lapilli.pipeline import load
from lapilli.prompt.encode import encode
from lapilli.prompt.message import Message
from lapilli.prompt.template import TEMPLATES
from pebble.draw import draw
from pebble.grow import check_growth, grow_language_model, grow_projector
from pebble.initialise import initialise
from pebble.run import RECIPES, Workshop
from pebble.typed import wide_scene

SMALL = DecoderConfig(
    vocab_size=40,
    hidden_size=8,
    intermediate_size=12,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    norm_eps=1e-5,
    rope_theta=1e4,
    max_positions=64,
)


def larger(times, each, small=SMALL):
    return replace(
        small,
        hidden_size=times * small.hidden_size,
        intermediate_size=times * small.intermediate_size,
        num_heads=times * small.num_heads,
        num_kv_heads=times * small.num_kv_heads,
        num_layers=each * small.num_layers,
    )


def fresh(config=SMALL):
    torch.manual_seed(0)
    model = Decoder(config)
    initialise(model, 3, depth=1)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "norm" in name:
                value.uniform_(0.5, 2.0)
    return model.eval()


def logits(model, ids):
    positions = torch.arange(ids.shape[1])[None].expand_as(ids)
    return model.logits(model.forward(model.embed(ids), position_ids=positions))


@settings(max_examples=20, deadline=None)
@given(times=st.integers(1, 4), each=st.integers(1, 3), noise=st.sampled_from([0.0, 1.0]))
def test_growth_keeps_the_function_with_and_without_noise(times, each, noise):
    small = fresh()
    grown = grow_language_model(small, larger(times, each), 0, noise=noise).eval()
    ids = torch.randint(40, (2, 9), generator=torch.Generator().manual_seed(times))
    with torch.no_grad():
        torch.testing.assert_close(logits(grown, ids), logits(small, ids), atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    return Workshop(RECIPES / "larger", tmp_path_factory.mktemp("work"))


def scores_of(chat, language_model, projector):
    """Logits of every position of a real prompt with a picture."""
    image = chat.model.modality("image")
    picture = image.prepare(draw(wide_scene(5)))
    features = image.tower_features(picture.pixel_values).flatten(0, 1)
    talk = [Message.user("How many objects are there?", "picture")]
    prompt = encode(TEMPLATES["vicuna_v1"].render(talk), chat.tokenizer, [len(features)])
    fused = VisionLanguageModel(language_model).embed_prompts([prompt], [[projector(features)]])
    positions = torch.arange(len(prompt))[None]
    return language_model.logits(
        language_model.forward(fused.inputs_embeds, position_ids=positions)
    )


@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_pebble_grows_without_a_change_of_its_logits(shop, noise):
    chat = load("pebble", device="cpu", dtype="float32")
    image = chat.model.modality("image")
    projector = build_projector(shop.projector)
    grow_projector(image.projector, projector, 1, noise=noise)
    grown = grow_language_model(chat.model.language_model, shop.text, 1, noise=noise).eval()
    with torch.inference_mode():
        before = scores_of(chat, chat.model.language_model, image.projector)
        after = scores_of(chat, grown, projector)
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)


def rank(weight):
    return int(torch.linalg.matrix_rank(weight, rtol=1e-4))


def test_only_noise_makes_a_matrix_of_more_than_copies():
    for noise, expected in ((0.0, 8), (1.0, 16)):
        grown = grow_language_model(fresh(), larger(2, 1), 0, noise=noise)
        weight = grown.model.layers[1].self_attn.q_proj.weight.detach()
        assert rank(weight) == expected
    small = fresh().model.layers[1].self_attn.q_proj.weight.detach()
    assert (
        0.6 < float(weight.std() / small.std()) < 0.8
    )  # 2 ** -0.5, that of fresh weights of twice the width


def step(model):
    """One step of training."""
    ids = torch.randint(40, (4, 12), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(3):
        scores = logits(model, ids)
        loss = torch.nn.functional.cross_entropy(scores[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


@pytest.mark.parametrize(("noise", "part"), [(0.0, False), (1.0, True)])
def test_copies_part_in_training_only_with_noise(noise, part):
    grown = step(grow_language_model(fresh(), larger(2, 1), 0, noise=noise))
    first, second = grown.model.embed_tokens.weight.detach().chunk(2, dim=1)
    apart = float((first - second).norm() / first.norm())
    assert (apart > 1e-3) == part


def test_added_layers_begin_with_nothing_and_learn():
    grown = grow_language_model(fresh(), larger(1, 2), 0)
    added = [grown.model.layers[i] for i in (1, 3)]
    ends = [end for one in added for end in (one.self_attn.o_proj, one.mlp.down_proj)]
    assert not any(end.weight.any() for end in ends)
    old = fresh().model.layers[1].self_attn
    assert torch.equal(grown.model.layers[3].self_attn.q_proj.weight, old.q_proj.weight)
    assert torch.equal(grown.model.layers[2].self_attn.o_proj.weight, old.o_proj.weight)
    step(grown)
    assert all(end.weight.any() for end in ends)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 24}, r"model\.text\.intermediate_size is 24 where 12 grows: expected 3"),
        ({"hidden_size": 20}, r"model\.text\.hidden_size is 20 where 8 grows: expected 2"),
        ({"num_heads": 2}, r"model\.text\.num_heads is 2"),
        ({"num_layers": 3}, r"model\.text\.num_layers is 3: expected a multiple of the 2"),
        ({"num_layers": 0}, r"model\.text\.num_layers is 0: expected a multiple of the 2"),
        ({"hidden_size": 4}, r"model\.text\.hidden_size is 4 where 8 grows: expected 1"),
        ({"head_dim": 8}, r"grows in hidden_size, .* alone"),
        ({"vocab_size": 41}, r"grows in hidden_size, .* alone"),
    ],
)
def test_other_sizes_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        check_growth(SMALL, replace(larger(2, 2), **changes))


@pytest.mark.parametrize("kind", ["tie_embeddings", "qk_norm"])
def test_other_kinds_are_refused(kind):
    other = replace(SMALL, **{kind: True})
    with pytest.raises(ConfigError, match="a head of its own and no norm of queries and keys"):
        check_growth(other, larger(2, 1, other))


def test_spread_parts_the_copies_from_the_start_and_costs_little():
    small, ids = fresh(), torch.arange(20).view(2, 10)
    grown = grow_language_model(small, larger(2, 1), 0, spread=0.1).eval()
    first, second = grown.model.embed_tokens.weight.detach().chunk(2, dim=1)
    assert not torch.equal(first, second)
    with torch.no_grad():
        before, after = logits(small, ids), logits(grown, ids)
    assert 0 < float((after - before).std() / before.std()) < 0.5


def test_the_recipe_has_one_stage_and_pebbles_tower(shop):
    assert shop.stages == ("4_instruct",)
    earlier = load("pebble", device="cpu", dtype="float32").model.modality("image").vision_tower
    expected = earlier.state_dict()
    assert all(
        torch.equal(value, expected[name]) for name, value in shop.tower().state_dict().items()
    )
    reader = shop.reader("4_instruct")
    number = sum(p.numel() for part in (reader, shop.tower()) for p in part.parameters())
    assert 36e6 < number < 42e6
