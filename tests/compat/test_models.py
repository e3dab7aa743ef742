"""What golden cases do not say: the shapes of calls, the options, and what is refused."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    LlamaForCausalLM,
    LogitsProcessorList,
    PreTrainedModel,
    TextStreamer,
)

from lapilli.compat.mm_utils import process_images, tokenizer_image_token
from lapilli.errors import MediaError
from tests.compat.conftest import MakeCheckpoint

Loaded = tuple[Any, Any, Any, int]
PROMPT = "USER: <image>\nWhat is it? ASSISTANT:"


@pytest.fixture
def ids(loaded: Loaded) -> torch.Tensor:
    return tokenizer_image_token(PROMPT, loaded[0], return_tensors="pt")[None]


@pytest.fixture
def pixels(loaded: Loaded, picture: Any) -> torch.Tensor:
    return process_images([picture], loaded[2], loaded[1].config)


def test_the_model_is_one_of_transformers(loaded: Loaded) -> None:
    model = loaded[1]
    assert isinstance(model, PreTrainedModel)
    assert isinstance(model, LlamaForCausalLM)
    names = dict(model.named_parameters())
    assert "model.layers.0.mlp.up_proj.weight" in names
    assert "model.vision_tower.vision_tower.vision_model.pre_layrnorm.weight" in names
    assert model.get_model() is model.model
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
    assert output.past_key_values[0][0].shape[2] == length
    loss, logits = model(ids, images=pixels, labels=labels, return_dict=False, use_cache=False)[:2]
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
        shapes.append(rows.shape[1])
        return rows.shape[1] == stop_at

    options = {"num_beams": 3, "max_new_tokens": 6, "return_dict_in_generate": True}
    model = loaded[1]
    found = model.generate(ids, images=pixels, stopping_criteria=[criterion], **options)
    assert shapes[:3] == [2, 3, 4]
    if stop_at == 4:
        assert found.sequences.shape == (1, 4)
        return
    plain = model.generate(ids, images=pixels, **options)
    assert torch.equal(found.sequences, plain.sequences)
    torch.testing.assert_close(found.sequences_scores, plain.sequences_scores)


@pytest.mark.parametrize(
    "option",
    [
        {"no_repeat_ngram_size": 3},
        {"min_new_tokens": 2},
        {"bad_words_ids": [[5]]},
        {"early_stopping": True, "num_beams": 2},
        {"logits_processor": LogitsProcessorList()},
    ],
    ids=lambda option: next(iter(option)),
)
def test_generate_takes_the_options_of_transformers(
    loaded: Loaded, ids: torch.Tensor, pixels: torch.Tensor, option: dict[str, Any]
) -> None:
    assert loaded[1].generate(ids, images=pixels, max_new_tokens=3, **option).shape == (1, 4)


def test_an_option_changes_the_answer(loaded: Loaded, ids: torch.Tensor, pixels: Any) -> None:
    model = loaded[1]
    plain = model.generate(ids, images=pixels, max_new_tokens=3)
    banned = [[int(plain[0, 1])]]
    other = model.generate(ids, images=pixels, max_new_tokens=3, bad_words_ids=banned)
    assert plain[0, 1] not in other[0]


def test_several_answers_scores_and_attentions(
    loaded: Loaded, ids: torch.Tensor, pixels: torch.Tensor
) -> None:
    model = loaded[1]
    options = {"images": pixels, "max_new_tokens": 2}
    assert model.generate(ids, num_beams=2, num_return_sequences=2, **options).shape[0] == 2
    found = model.generate(
        ids,
        return_dict_in_generate=True,
        output_scores=True,
        output_attentions=True,
        output_hidden_states=True,
        **options,
    )
    length = ids.shape[1] - 1 + 16
    assert [score.shape for score in found.scores] == [(1, 1000)] * 2
    assert found.attentions[0][0].shape == (1, 4, length, length)
    assert len(found.hidden_states[0]) == 4
    assert model.config._attn_implementation == "sdpa"


def test_hidden_states_and_attentions_of_every_layer(loaded: Loaded, ids: torch.Tensor) -> None:
    ids = ids.clamp(min=3)
    output = loaded[1](ids, output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == 4
    assert [weights.shape[-1] for weights in output.attentions] == [ids.shape[1]] * 3
    plain = loaded[1](ids)
    torch.testing.assert_close(plain.logits, output.logits, atol=1e-5, rtol=0)


def test_hooks_single_layers_and_the_stack(loaded: Loaded, ids: torch.Tensor) -> None:
    model, ids = loaded[1], ids.clamp(min=3)
    seen: list[tuple[int, ...]] = []
    hook = model.model.layers[1].register_forward_hook(
        lambda layer, given, made: seen.append(tuple(given[0].shape))
    )
    hidden = model.model(input_ids=ids).last_hidden_state
    hook.remove()
    assert seen == [(1, ids.shape[1], 64)]
    assert torch.equal(model.lm_head(hidden), model(ids).logits)
    assert model.model.layers[0].mlp(hidden).shape == hidden.shape


def test_the_tower_gives_its_hidden_states(loaded: Loaded) -> None:
    tower = loaded[1].get_vision_tower()
    pixels = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    states = tower.vision_tower(pixels, output_hidden_states=True).hidden_states
    assert torch.equal(states[-2][:, 1:], tower(pixels))
    assert tower.vision_tower.vision_model.embeddings.position_ids.tolist() == [list(range(17))]
    with pytest.raises(MediaError, match="pixels of 28x42: the tower takes 56x56"):
        tower(torch.zeros(1, 3, 28, 42))


def test_pairs_of_keys_and_values_are_a_cache(loaded: Loaded, ids: torch.Tensor) -> None:
    model, ids = loaded[1], ids.clamp(min=3)
    first = model(ids[:, :-1])
    pairs = tuple(first.past_key_values[i] for i in range(len(first.past_key_values)))
    second = model(ids[:, -1:], past_key_values=pairs)
    torch.testing.assert_close(second.logits[:, -1], model(ids).logits[:, -1], atol=1e-5, rtol=0)


def test_what_is_saved_loads_again(
    loaded: Loaded, ids: torch.Tensor, pixels: torch.Tensor, tmp_path: Any
) -> None:
    from llava.model.builder import load_pretrained_model

    tokenizer, model, processor, _ = loaded
    folder = str(tmp_path / "llava-merged")
    for part in (model, tokenizer, processor):
        part.save_pretrained(folder)
    expected = model(ids, images=pixels).logits
    again = load_pretrained_model(folder, None, "llava-merged", device="cpu")[1]
    torch.testing.assert_close(again(ids, images=pixels).logits, expected, atol=1e-5, rtol=0)
    plain = type(model).from_pretrained(folder)
    assert not plain.get_vision_tower().is_loaded
    plain.get_vision_tower().load_model()
    torch.testing.assert_close(plain(ids, images=pixels).logits, expected, atol=1e-5, rtol=0)
    assert type(AutoModelForCausalLM.from_pretrained(folder)) is type(model)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT asks transformers by an old name
def test_peft_trains_it(make_checkpoint: MakeCheckpoint, ids: torch.Tensor, pixels: Any) -> None:
    from llava.model.builder import load_pretrained_model

    path = make_checkpoint("llava-v1.5-tiny-pad")["model_path"]
    model = load_pretrained_model(path, None, "llava", device="cpu")[1]
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    labels = torch.where(ids < 0, -100, ids)
    adapted(input_ids=ids, images=pixels, labels=labels).loss.backward()
    trained = {name for name, p in adapted.named_parameters() if p.grad is not None}
    assert trained
    assert all("lora_" in name for name in trained)


def test_embeddings_are_not_generated_from(loaded: Loaded) -> None:
    with pytest.raises(NotImplementedError, match="takes input ids"):
        loaded[1].generate(torch.zeros(1, 1).long(), inputs_embeds=torch.zeros(1, 1, 64))


def test_the_embedding_can_grow(make_checkpoint: MakeCheckpoint) -> None:
    from llava.model.builder import load_pretrained_model

    path = make_checkpoint("llava-v1.5-tiny-pad")["model_path"]
    model = load_pretrained_model(path, None, "llava", device="cpu")[1]
    model.resize_token_embeddings(1001)
    assert model.get_input_embeddings().weight.shape[0] == 1001
    assert model.config.vocab_size == 1001


def test_max_length_of_the_config_counts(loaded: Loaded) -> None:
    assert loaded[1].generation_config.max_length == 4096


def test_positions_are_counted_without_padding_on_either_side(loaded: Loaded) -> None:
    mask = torch.tensor([[0, 1, 1], [1, 1, 0]])
    prepared = loaded[1].prepare_inputs_for_generation(
        torch.ones(2, 1).long(),
        inputs_embeds=torch.zeros(2, 3, 64),
        attention_mask=mask,
        is_first_iteration=True,
        use_cache=False,
    )
    assert prepared["position_ids"].tolist() == [[1, 0, 1], [0, 1, 1]]
