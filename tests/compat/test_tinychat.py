"""TinyChat's class: both ways to place pictures, both modes, and what is refused."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

import lapilli
from tests.compat.conftest import MakeCheckpoint

PATCH = 7
SIZE = 16  # patches of a picture of the tiny tower
EXAMPLES = Path(__file__).with_name("tinychat_example.txt")
Loaded = tuple[Any, Any, Any, int]


@pytest.fixture
def constants(monkeypatch: pytest.MonkeyPatch) -> Any:
    import tinychat.utils.constants as module

    monkeypatch.setattr(module, "LLAVA_DEFAULT_IMAGE_PATCH_TOKEN_IDX", PATCH)
    return module


@pytest.fixture
def config(make_checkpoint: MakeCheckpoint) -> Any:
    path = make_checkpoint("llava-v1.5-tiny-pad")["model_path"]
    return AutoConfig.from_pretrained(path)


@pytest.fixture
def model(loaded: Loaded, config: Any, constants: Any) -> Any:
    """TinyChat's class with the weights of the other names' model."""
    from tinychat.models.llava_llama import LlavaLlamaForCausalLM

    made = LlavaLlamaForCausalLM(config, dev="cpu")
    made.get_vision_tower().load_model()
    made.load_state_dict(loaded[1].state_dict())
    return made.eval()


@pytest.fixture
def pixels(loaded: Loaded) -> torch.Tensor:
    side = loaded[1].get_vision_tower().config.image_size
    return torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(0))


def row(*parts: int | str) -> list[int]:
    """Ids of a row: "p" is a picture of patch tokens."""
    return [i for part in parts for i in ([PATCH] * SIZE if part == "p" else [int(part)])]


def test_the_examples_of_its_documentation(config: Any, constants: Any, loaded: Loaded) -> None:
    first, second = EXAMPLES.read_text().split("---\n")
    names: dict[str, Any] = {
        "config": config,
        "input_ids": torch.tensor([row(1, 20, "p", 21, 22)]),
        "image_tensor": torch.randn(1, 3, 32, 32)[:, :, :1, :1].expand(1, 3, *side_of(loaded)),
        "attention_mask": torch.ones(1, 20, dtype=torch.long),
    }
    names["labels"] = torch.where(names["input_ids"] == PATCH, -100, names["input_ids"])
    exec(compile(first, "first", "exec"), names)
    assert names["loss"].item() > 0
    assert names["output"].logits.shape == (1, 20, config.vocab_size)
    names["model"].eval()
    names["model"].forward(names["input_ids"], start_pos=0, images=names["image_tensor"])
    names |= {"next_token_ids": torch.tensor([[30]]), "current_position": 20}
    exec(compile(second, "second", "exec"), names)
    assert names["logits"].shape == (1, 1, config.vocab_size)


def side_of(loaded: Loaded) -> tuple[int, int]:
    side = loaded[1].get_vision_tower().config.image_size
    return side, side


def test_its_classes_are_those_of_the_other_names(model: Any) -> None:
    from llava.model import LlavaLlamaForCausalLM as Original
    from tinychat.models import LlavaLlamaForCausalLM
    from tinychat.models.llava_llama import LlavaLlamaModel

    assert isinstance(model, LlavaLlamaForCausalLM)
    assert isinstance(model, Original)
    assert type(model.get_model()) is LlavaLlamaModel


@torch.inference_mode()
def test_both_places_give_the_same(model: Any, loaded: Loaded, pixels: torch.Tensor) -> None:
    patches = torch.tensor([row(1, 20, "p", 21, "p", 22)])
    short = torch.tensor([[1, 20, -200, 21, -200, 22]])
    found = model(patches, images=pixels[:2]).logits
    expected = loaded[1](short, images=pixels[:2]).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    special = model(short, images=list(pixels[:2]), special_token=True).logits
    torch.testing.assert_close(special, expected, atol=1e-5, rtol=0)


@torch.inference_mode()
def test_start_and_end_are_tokens_like_others(model: Any, pixels: torch.Tensor) -> None:
    ids = torch.tensor([row(1, 8, "p", 9, 2)])
    embeds = model.default_inputs_embeds_for_multimodal(ids, None, pixels[:1])
    plain = model.get_input_embeddings()(ids)
    assert torch.equal(embeds[0, [0, 1, -2, -1]], plain[0, [0, 1, -2, -1]])
    assert not torch.isclose(embeds[0, 2:-2], plain[0, 2:-2]).all(dim=-1).any()


def test_the_full_mode_returns_everything(model: Any, pixels: torch.Tensor) -> None:
    ids = torch.tensor([row(1, "p", 21, 22), row(1, 30, "p", 23)])
    labels = torch.where(ids == PATCH, -100, ids)
    asked = {"labels": labels, "output_attentions": True, "output_hidden_states": True}
    output = model(ids, images=pixels[:2], **asked)
    layers = model.config.num_hidden_layers
    assert len(output.hidden_states) == layers + 1
    assert len(output.attentions) == layers
    assert output.attentions[0].shape[-2:] == (SIZE + 3, SIZE + 3)
    logits = output.logits[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected)
    told = model(ids, images=pixels[:2], return_dict=False, **asked)
    assert isinstance(told, tuple)
    torch.testing.assert_close(told[0], output.loss)
    torch.testing.assert_close(told[1], output.logits)


@pytest.mark.parametrize("rows", [1, 3])
@torch.inference_mode()
def test_steps_continue_the_prompt(model: Any, pixels: torch.Tensor, rows: int) -> None:
    """Prompt, steps and a second turn, against all positions at once."""
    texts = torch.randint(10, 900, (rows, 9), generator=torch.Generator().manual_seed(1))
    picture = torch.full((rows, SIZE), PATCH)
    ids = torch.cat([texts[:, :3], picture, texts[:, 3:]], dim=1)
    whole = model(ids, images=pixels[:rows]).logits
    prompt = SIZE + 4
    found = model.forward(ids[:, :prompt], start_pos=0, images=pixels[:rows])
    assert found.dtype == torch.float32
    assert found.shape == (rows, 1, model.config.vocab_size)
    torch.testing.assert_close(found[:, 0], whole[:, prompt - 1], atol=1e-4, rtol=0)
    step = model.forward(ids[:, prompt : prompt + 1], start_pos=prompt, images=None)
    torch.testing.assert_close(step[:, 0], whole[:, prompt], atol=1e-4, rtol=0)
    turn = model.forward(ids[:, prompt + 1 :], start_pos=prompt + 1)
    torch.testing.assert_close(turn[:, 0], whole[:, -1], atol=1e-4, rtol=0)
    again = model.forward(ids[:, prompt:], start_pos=prompt)  # the turn, asked in another way
    torch.testing.assert_close(again[:, 0], whole[:, -1], atol=1e-4, rtol=0)


def test_a_position_that_nothing_leads_to(model: Any) -> None:
    with pytest.raises(ValueError, match="keys and values of 0 positions"):
        model.forward(torch.tensor([[5]]), start_pos=4)
    model.forward(torch.tensor([[1, 5, 6]]), start_pos=0)
    with pytest.raises(ValueError, match=r"start_pos is 4, but .* 3 positions"):
        model.forward(torch.tensor([[5]]), start_pos=4)
    with pytest.raises(ValueError, match="start_pos is -1"):
        model.forward(torch.tensor([[5]]), start_pos=-1)
    with pytest.raises(ValueError, match="2 rows continue 1"):
        model.forward(torch.tensor([[5], [6]]), start_pos=3)
    most = model.config.max_position_embeddings
    with pytest.raises(ValueError, match=f"behind the {most}"):
        model.forward(torch.full((1, most + 1), 5), start_pos=0)
    with pytest.raises(ValueError, match="needs input_ids"):
        model.forward(start_pos=0)


def test_rows_that_do_not_keep_step(model: Any, pixels: torch.Tensor) -> None:
    ids = torch.tensor([[0, 1, 5], [1, 5, 6]])
    with pytest.raises(ValueError, match="rows without padding"):
        model.forward(ids, start_pos=0, attention_mask=(ids > 0).long())
    rows = torch.tensor([[1, 5, -200, 7], [1, 5, 6, 7]])
    with pytest.raises(ValueError, match=r"same number of pictures, found \[1, 0\]"):
        model.forward(rows, start_pos=0, images=pixels[:2], special_token=True)
    with pytest.raises(ValueError, match="has no loss"):
        model.forward(ids, start_pos=0, labels=ids)


def test_embeddings_are_taken_as_they_are(model: Any, pixels: torch.Tensor) -> None:
    ids = torch.tensor([row(1, "p", 21)])
    embeds = model.get_input_embeddings()(ids)
    found = model(ids, inputs_embeds=embeds, images=pixels[:1]).logits
    assert torch.equal(found, model(inputs_embeds=embeds).logits)


def noise(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    ids = torch.tensor([row(1, "p", 21)])
    embeds = model.default_inputs_embeds_for_multimodal(ids, None, pixels[:1])
    alpha, model.config.neftune_alpha = model.config.neftune_alpha, 0
    plain = model.default_inputs_embeds_for_multimodal(ids, None, pixels[:1])
    model.config.neftune_alpha = alpha
    return (embeds - plain)[0].detach()


def test_noise_on_pictures_while_training(model: Any, pixels: torch.Tensor) -> None:
    model.config.neftune_alpha = 5
    most = 5 / (SIZE * model.config.hidden_size) ** 0.5
    assert not noise(model, pixels).any()
    model.train()
    found = noise(model, pixels)
    assert not found[[0, -1]].any()
    assert 0.9 * most < found.abs().max() <= most * (1 + 1e-5)
    model.eval()
    model.config.neftune_noise_in_eval = True  # as the reference
    assert noise(model, pixels).any()


def test_too_few_pictures(model: Any, pixels: torch.Tensor) -> None:
    ids = torch.tensor([row(1, "p", 21, "p")])
    with pytest.raises(ValueError, match="INDEXING ERROR! 16 patch tokens"):
        model(ids, images=pixels[:1])
    model.train()
    embeds = model.default_inputs_embeds_for_multimodal(ids, None, pixels[:1])
    assert torch.equal(embeds[0, -SIZE:], model.get_input_embeddings()(ids)[0, -SIZE:])


def test_patches_of_half_a_picture(model: Any, pixels: torch.Tensor) -> None:
    with pytest.raises(AssertionError, match="patch tokens are no picture"):
        model(torch.tensor([row(1, "p", 21, 22)])[:, 4:], images=pixels[:1])
    spread = torch.tensor([[*[PATCH] * 4, 1, *[PATCH] * 12]])
    embeds = model.default_inputs_embeds_for_multimodal(spread, None, pixels[:1])
    assert torch.equal(
        embeds[0, -1], model.get_input_embeddings().weight[PATCH]
    )  # as the reference


def test_pictures_that_no_place_is_left_for(model: Any, pixels: torch.Tensor) -> None:
    ids = torch.tensor([row(1, "p", 21)])
    assert torch.equal(model(ids, images=pixels).logits, model(ids, images=pixels[:1]).logits)


def test_ids_of_the_other_kind(model: Any, pixels: torch.Tensor) -> None:
    with pytest.raises(IndexError, match="special_token=True"):
        model(torch.tensor([[1, -200, 5]]), images=pixels[:1])


def test_two_layers_of_the_tower_side_by_side(config: Any, constants: Any, pixels: Any) -> None:
    from tinychat.models.llava_llama import LlavaLlamaForCausalLM

    config = copy.deepcopy(config)
    config.mm_vision_select_layer = -201  # 1 and -2
    config.mm_hidden_size *= 2
    model = LlavaLlamaForCausalLM(config, dev="cuda").eval()
    features = model._patch_features(pixels[:1])
    assert features.shape == (1, SIZE, config.hidden_size)


@pytest.mark.slow
def test_it_learns_and_is_read_by_all(
    model: Any, pixels: torch.Tensor, loaded: Loaded, tmp_path: Path, picture: Any
) -> None:
    ids = torch.tensor([row(1, "p", 21, 22)])
    labels = torch.where(ids == PATCH, -100, ids)
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    before = model(ids, images=pixels[:1], labels=labels).loss
    before.backward()
    assert model.get_model().mm_projector[0].weight.grad.abs().sum() > 0
    optimizer.step()
    after = model(ids, images=pixels[:1], labels=labels).loss
    assert after < before
    model.eval()
    model.save_pretrained(tmp_path)
    loaded[0].save_pretrained(tmp_path)
    chat = lapilli.load(str(tmp_path), device="cpu")
    assert chat.ask("What?", picture, max_new_tokens=2) is not None
    from llava.model import LlavaLlamaForCausalLM as Original

    other = Original.from_pretrained(tmp_path).eval()
    other.get_vision_tower().load_model()
    short = torch.tensor([[1, -200, 21, 22]])
    with torch.inference_mode():
        expected = model(ids, images=pixels[:1]).logits
        torch.testing.assert_close(other(short, images=pixels[:1]).logits, expected)


@torch.inference_mode()
def test_generate_reads_both_places(model: Any, pixels: torch.Tensor) -> None:
    options = {"do_sample": False, "max_new_tokens": 4}
    patches = torch.tensor([row(1, "p", 21)])
    found = model.generate(patches, images=pixels[:1], **options)
    expected = model.generate(torch.tensor([[1, -200, 21]]), images=pixels[:1], **options)
    assert torch.equal(found, expected)
    prepared = model.prepare_inputs_for_generation(patches, images=pixels[:1])
    assert torch.equal(prepared["images"], pixels[:1])
    assert "images" not in model.prepare_inputs_for_generation(patches)
