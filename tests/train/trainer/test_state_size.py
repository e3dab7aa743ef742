"""A state is what trains, its moments and its averages, whatever file the base is mapped from."""

import pytest
import torch

from lapilli.checkpoint.load import load_checkpoint
from lapilli.checkpoint.write.huggingface import save_hf
from lapilli.checkpoint.write.llava import save_llava
from lapilli.quant import QuantConfig, quantize
from lapilli.train.recipe import LoraRecipe, ModelRecipe, OptimRecipe, Recipe, RunRecipe
from lapilli.train.stages import choose_trainable, load_start
from lapilli.train.trainer.optim import Average, build_optimizer
from lapilli.train.trainer.state import load_state, save_best, save_state
from lapilli.train.trainer.task import Best, RunState
from tests.checkpoint.conftest import llava, packed_llava  # noqa: F401  fixtures
from tests.train.trainer.test_damaged_state import everything
from tests.train.trainer.test_state import in_pieces

INT4 = QuantConfig(bits=4)
LORA = LoraRecipe(rank=2)
WHAT = {
    "projector": {"stage": "align"},
    "whole": {},
    "tower": {"model": {"tune_tower": True}},
    "lora": {"lora": LORA},
    "lora over nf4": {"lora": LoraRecipe(rank=2, base="nf4")},
    "lora over int4": {"lora": LoraRecipe(rank=2, base="int4")},
}
PACKED = ("packed", "awq")
PER_TENSOR = 2500  # bytes: names, shapes, and in pieces an archive of its own


@pytest.fixture(scope="module")
def layouts(llava, packed_llava, tmp_path_factory):  # noqa: F811
    root = tmp_path_factory.mktemp("layouts")
    loaded = load_checkpoint(llava, device="cpu", dtype="float32")
    model, config, at = loaded.model, loaded.config, loaded.tokenizer_path
    save_llava(root / "original", model, config, dtype=torch.float32, tokenizer_path=at)
    save_hf(
        root / "huggingface",
        model,
        config,
        dtype=torch.float32,
        tokenizer=loaded.tokenizer,
        tokenizer_path=at,
        template="vicuna_v1",
    )
    quantize(model, INT4)
    save_llava(root / "packed", model, config, quantization=INT4, tokenizer_path=at)
    return {name: root / name for name in ("original", "packed", "huggingface")} | {
        "awq": packed_llava
    }


CASES = [
    (layout, what)
    for layout in ("original", "huggingface", *PACKED)
    for what in WHAT
    if layout not in PACKED or what == "projector"  # packed weights do not learn
]


def trained_once(checkpoint, what):
    given = dict(WHAT[what])
    model = ModelRecipe(checkpoint=str(checkpoint), **given.pop("model", {}))
    recipe = Recipe(
        **{"stage": "instruct", **given},
        optim=OptimRecipe(lr=1e-3),
        run=RunRecipe(batch_size=1),
        model=model,
    )
    vlm = load_start(recipe).model
    choose_trainable(vlm, recipe)
    optimizer = build_optimizer(vlm, recipe.optim)
    state = RunState(vlm, optimizer, Average(vlm, 0.9), best=Best(1, 0.5))
    for parameter in vlm.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state.step = 1
    return state


def size_of(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "what"), CASES)
def test_a_state_has_nothing_of_the_base(layouts, tmp_path, layout, what):
    state = trained_once(layouts[layout], what)
    weights = sum(value.nbytes for value in state.trained.values())
    kept = [value for key, value in everything(state).items() if isinstance(value, torch.Tensor)]
    room = PER_TENSOR * (len(kept) + 20)
    assert (
        sum(value.nbytes for value in kept) >= 4 * weights
    )  # float32: itself, two moments, average
    for name, save in (("file", save_state), ("pieces", in_pieces)):
        (tmp_path / name).mkdir()
        save(state, tmp_path / name)
        assert size_of(tmp_path / name) <= sum(value.nbytes for value in kept) + room
    save_best(state, tmp_path)
    averages = sum(value.nbytes for value in state.average.tensors.values())
    assert (tmp_path / "best.pt").stat().st_size <= averages + room
    again = trained_once(layouts[layout], what)
    assert load_state(again, tmp_path / "file")
    ours, theirs = everything(state), everything(again)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_base_is_larger_than_what_a_state_may_take(layouts):
    """Else the test above could not fail."""
    state = trained_once(layouts["original"], "projector")
    most = PER_TENSOR * (len(everything(state)) + 20) + 5 * size_of(layouts["original"]) // 10
    assert size_of(layouts["original"]) > most
    views = [p for p in state.trained.values() if p.untyped_storage().nbytes() > p.nbytes]
    assert views
