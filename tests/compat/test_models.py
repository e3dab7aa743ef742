"""What golden cases do not say: the shapes of calls, the options, and what is refused."""

from typing import Any

import pytest
import torch

from lapilli.compat.generation import GenerationDefaults, as_batch
from lapilli.compat.mm_utils import process_images, tokenizer_image_token
from lapilli.compat.text_streamer import TextStreamer
from lapilli.errors import GenerationError

Loaded = tuple[Any, Any, Any, int]
PROMPT = "USER: <image>\nWhat is it? ASSISTANT:"


@pytest.fixture
def ids(loaded: Loaded) -> torch.Tensor:
    return tokenizer_image_token(PROMPT, loaded[0], return_tensors="pt")[None]


@pytest.fixture
def pixels(loaded: Loaded, picture: Any) -> torch.Tensor:
    return process_images([picture], loaded[2], loaded[1].config)


def test_parameters_have_the_original_names_and_share_their_weights(loaded: Loaded) -> None:
    model = loaded[1]
    named = dict(model.named_parameters())
    ours = model.inner.language_model.model.layers[0].mlp.up_proj.weight
    assert named["model.layers.0.mlp.up_proj.weight"] is ours
    assert named["model.mm_projector.0.weight"] is model.inner.modalities.image.projector[0].weight
    inside = {id(p) for p in model.inner.parameters()}
    assert {id(p) for p in named.values()} == inside
    assert model.get_model().get_vision_tower() is model.get_vision_tower()


def test_the_forward_pass_by_name_number_and_tuple(
    loaded: Loaded, ids: torch.Tensor, pixels: torch.Tensor
) -> None:
    model = loaded[1]
    labels = torch.where(ids < 0, -100, ids)
    output = model(ids, images=pixels, labels=labels)
    length = ids.shape[1] - 1 + 16
    assert output.logits.shape == (1, length, 1000)
    assert output[0] is output.loss
    assert output.past_key_values is None
    loss, logits = model(ids, images=pixels, labels=labels, return_dict=False)
    assert torch.equal(logits, output.logits)
    assert torch.equal(loss, output.loss)


def test_half_pixels_are_cast(loaded: Loaded, ids: torch.Tensor, pixels: torch.Tensor) -> None:
    with torch.inference_mode():
        logits = loaded[1](ids, images=pixels.half()).logits
    assert logits.dtype == torch.float32


def test_a_cache_continues_the_forward_pass(
    loaded: Loaded, ids: torch.Tensor, pixels: torch.Tensor
) -> None:
    model, next_id = loaded[1], torch.tensor([[300]])
    with torch.inference_mode():
        first = model(ids, images=pixels, use_cache=True)
        second = model(next_id, past_key_values=first.past_key_values, images=pixels)
        whole = model(torch.cat([ids, next_id], dim=1), images=pixels)
    torch.testing.assert_close(second.logits[:, -1], whole.logits[:, -1], atol=1e-5, rtol=0)


def test_generate_returns_one_bos_and_the_new_tokens(
    loaded: Loaded, ids: torch.Tensor, pixels: torch.Tensor
) -> None:
    out = loaded[1].generate(ids, images=pixels, do_sample=False, max_new_tokens=5)
    assert out.shape == (1, 6)
    assert out[0, 0] == 1


def test_max_length_counts_the_bos(loaded: Loaded, ids: torch.Tensor, pixels: Any) -> None:
    assert loaded[1].generate(ids, images=pixels, max_length=4).shape == (1, 4)


@pytest.mark.slow
def test_sampling_follows_the_global_seed(
    loaded: Loaded, ids: torch.Tensor, pixels: torch.Tensor
) -> None:
    def sample(seed: int) -> list[int]:
        torch.manual_seed(seed)
        out = loaded[1].generate(
            ids, images=pixels, do_sample=True, temperature=2.0, top_p=None, max_new_tokens=12
        )
        return out[0].tolist()

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_a_streamer_shows_what_is_returned(
    loaded: Loaded, ids: torch.Tensor, pixels: torch.Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer, model, _, _ = loaded
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    out = model.generate(ids, images=pixels, max_new_tokens=6, streamer=streamer)
    text = tokenizer.batch_decode(out, skip_special_tokens=True)[0]
    assert capsys.readouterr().out == f"{text}\n"


def test_a_stopping_criterion_ends_the_answer(
    loaded: Loaded, ids: torch.Tensor, pixels: torch.Tensor
) -> None:
    seen = []

    def after_three(rows: torch.Tensor, scores: object) -> bool:
        seen.append(rows.shape[1])
        return rows.shape[1] == 4

    out = loaded[1].generate(ids, images=pixels, max_new_tokens=9, stopping_criteria=[after_three])
    assert out.shape == (1, 4)
    assert seen == [2, 3, 4]


@pytest.mark.parametrize("stop_at", [99, 4])
def test_criteria_see_every_beam(
    loaded: Loaded, ids: torch.Tensor, pixels: torch.Tensor, stop_at: int
) -> None:
    shapes = []

    def criterion(rows: torch.Tensor, scores: object) -> bool:
        shapes.append(tuple(rows.shape))
        return rows.shape[1] == stop_at

    options = {"num_beams": 3, "max_new_tokens": 6, "return_dict_in_generate": True}
    model = loaded[1]
    found = model.generate(ids, images=pixels, stopping_criteria=[criterion], **options)
    assert shapes[:3] == [(3, 2), (3, 3), (3, 4)]
    if stop_at == 4:
        assert found.sequences.shape == (1, 4)
        return
    plain = model.generate(ids, images=pixels, **options)
    assert torch.equal(found.sequences, plain.sequences)
    torch.testing.assert_close(found.sequences_scores, plain.sequences_scores)


def test_an_unknown_option_is_named(loaded: Loaded, ids: torch.Tensor) -> None:
    with pytest.raises(GenerationError, match="no option no_repeat_ngram_size here"):
        loaded[1].generate(ids[:, :1], no_repeat_ngram_size=2)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"early_stopping": True}, "early_stopping is not False"),
        ({"num_return_sequences": 2}, "num_return_sequences is 2"),
    ],
)
def test_options_that_would_change_the_result_are_refused(
    loaded: Loaded, ids: torch.Tensor, option: dict[str, Any], message: str
) -> None:
    with pytest.raises(GenerationError, match=message):
        loaded[1].generate(ids[:, :1], **option)


def test_a_streamer_does_not_go_with_beams(loaded: Loaded, ids: torch.Tensor) -> None:
    streamer = TextStreamer(loaded[0])
    with pytest.raises(GenerationError, match="a streamer with beams"):
        loaded[1].generate(ids[:, :1], num_beams=2, streamer=streamer)


def test_embeddings_are_not_generated_from(loaded: Loaded) -> None:
    with pytest.raises(NotImplementedError, match="takes input ids"):
        loaded[1].generate(torch.zeros(1, 1).long(), inputs_embeds=torch.zeros(1, 1, 64))


def test_the_embedding_keeps_the_length_of_the_tokenizer(loaded: Loaded) -> None:
    model = loaded[1]
    assert model.resize_token_embeddings(1000) is model.get_input_embeddings()
    with pytest.raises(ValueError, match="the embedding has 1000 rows"):
        model.resize_token_embeddings(1001)


def test_generation_config_is_read() -> None:
    defaults = GenerationDefaults.of(
        {"temperature": 0.9, "top_p": 0.6, "eos_token_id": [2, 3], "transformers_version": "4"}
    )
    assert defaults.eos_ids == (2, 3)
    assert defaults.sampling().temperature == 0
    sampled = defaults.updated({"do_sample": True, "max_new_tokens": 7}).sampling()
    assert (sampled.temperature, sampled.top_p, sampled.top_k) == (0.9, 0.6, 50)
    assert sampled.max_new_tokens == 7


def test_positions_are_counted_without_padding_on_either_side() -> None:
    mask = torch.tensor([[0, 1, 1], [1, 1, 0]])
    batch = as_batch(torch.zeros(2, 3, 4), mask)
    assert batch.position_ids.tolist() == [[1, 0, 1], [0, 1, 1]]
    assert as_batch(torch.zeros(1, 2, 4), None).attention_mask.all()
