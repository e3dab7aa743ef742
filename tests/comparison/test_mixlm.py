"""MixLM's comparison: the whole program at toy sizes, and what its parts are made of."""

import json
from dataclasses import replace

import pytest
import torch

from comparison import mixlm
from comparison.generated import ASKED, ATTRIBUTES, OTHER_WORDS
from comparison.language_model import Sizes, write_language_model
from comparison.mixlm_report import page, tables, verdict
from comparison.rankers import (
    ITEM,
    Course,
    ReasoningTask,
    encoder_of,
    item_flops,
    open_chat,
    train_vectors,
    vectors_of,
)
from comparison.shop import ABLATIONS, EMBEDDING, TEACHER, TOWERS, WITHOUT_VECTORS, Shop
from lapilli.checkpoint.export import save_loaded
from lapilli.checkpoint.load import load_checkpoint

VALUES = {word for values in ATTRIBUTES.values() for word in values}
SAME = {
    other: word
    for name, values in ATTRIBUTES.items()
    for word, other in zip(values, OTHER_WORDS[name], strict=True)
}
SIZES = Sizes(vocabulary=400, width=32, inner=48, layers=1, heads=2)
TEXTS = ["a wing in a stream of air", "the heat of a wing", "a shell under load", "load on a shell"]


def test_the_program_writes_every_row_of_the_shop(tmp_path, capsys):
    out = tmp_path / "mixlm.json"
    mixlm.main(["--quick", "--ablations", "--out", str(out)])
    said = capsys.readouterr().out
    found = json.loads(out.read_text())["shop"]
    assert set(found["ablations"]) == {*ABLATIONS, WITHOUT_VECTORS}
    assert {"random order", TOWERS, TEACHER, EMBEDDING} <= set(found["rows"])
    assert all(0 <= row["ndcg"][0] <= 1 for row in found["rows"].values())
    assert found["rows"][EMBEDDING]["positions"] == 1 < found["rows"][TEACHER]["positions"]
    assert found["rows"][TEACHER]["of teacher"] == pytest.approx([1, 1, 1])
    for name in found["rows"]:
        assert f"| {name} |" in said
        assert f"| {name} |" in page({"shop": found, "validation": found})
    for name, (mean, low, high) in found["above"].items():
        expected = found["rows"][EMBEDDING]["ndcg"][0] - found["rows"][name]["ndcg"][0]
        assert mean == pytest.approx(expected)
        assert low <= mean <= high
    assert tables(found).count("\n|") >= len(found["rows"]) + len(ABLATIONS)


def asked(text):
    """Return the values that a query asks for, in the words of the items."""
    words = text.replace(",", "").replace(".", "").replace("?", "").split()
    return {SAME.get(word, word) for word in words} & VALUES


def test_a_reason_says_what_is_wanted_and_grades_agree():
    shop = Shop(mixlm.QUICK_SHOP, test=1)
    for record in shop.records(20):
        query = record[0][0]
        for (word, learned), (answer, answer_learned) in zip(
            record[1::2], record[2::2], strict=True
        ):
            assert (learned, answer_learned) == (False, True)
            assert (answer == "yes") == (word in asked(query))
    for query, item in shop.pairs(20):
        shared = asked(query.text) & set(item.words)
        assert query.grade(item) == len(shared) <= ASKED


def test_the_test_is_another_draw_than_the_validation():
    first, second = (Shop(mixlm.QUICK_SHOP, test=test) for test in (0, 1))
    assert first.known == second.known
    assert {item.values for item in first.items} != {item.values for item in second.items}
    seen = {item.values for item in first.known}
    assert first.overlap == sum(item.values in seen for item in first.items)


@pytest.mark.parametrize("fillers", [None, 2])
def test_examples_have_the_texts_and_grades_of_their_items(fillers):
    shop = Shop(replace(mixlm.QUICK_SHOP, fillers=fillers), test=1)
    for example in shop.examples(20, shop.text):
        words = example.item.replace(",", "").replace(".", "").split()
        grade = len(asked(example.query) & set(words))
        assert example.label == grade / ASKED
    assert (", " in shop.texts[0]) == (fillers is None)


def test_only_learned_pieces_are_supervised(tmp_path):
    write_language_model(tmp_path / "fresh", [*TEXTS, "yes no"], SIZES)
    chat = open_chat(tmp_path / "fresh")
    task = ReasoningTask(chat, [[("a wing", False), ("yes", True), ("load", False)]], 2)
    batch, count = task.batch(0, 0)
    assert count == 2  # one word in each of two rows
    [yes] = chat.tokenizer.encode("yes")
    assert batch.input_ids[batch.loss_mask].tolist() == [yes, yes]


def test_a_fresh_model_is_a_function_of_its_seed_and_is_saved_as_it_is(tmp_path):
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        write_language_model(tmp_path / name, TEXTS, SIZES, seed=seed)
    one, same, other = (
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "same", "other")
    )
    assert one == same != other
    loaded = load_checkpoint(tmp_path / "one", device="cpu", dtype="float32")
    save_loaded(tmp_path / "saved", loaded, layout="huggingface")
    again = load_checkpoint(tmp_path / "saved", device="cpu", dtype="float32")
    for name, tensor in loaded.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name])


def test_an_item_behind_a_longer_prefix_costs_its_attention_more(tmp_path):
    write_language_model(tmp_path / "fresh", TEXTS, SIZES)
    text = open_chat(tmp_path / "fresh").config.text
    one, more, behind = (item_flops(text, *both) for both in ((10, 1), (10, 5), (100, 1)))
    linear = 2 * text.num_layers * sum(a * b for a, b in text.linear_widths)
    heads = 4 * text.num_layers * text.num_heads * text.head_dim
    assert one == linear + heads * (11**2 - 10**2)
    assert more == 5 * linear + heads * (15**2 - 10**2)
    assert one < behind == linear + heads * (101**2 - 100**2)


def test_an_encoder_learns_where_words_lie_and_the_ranker_stays(tmp_path):
    write_language_model(tmp_path / "ranker", TEXTS, SIZES)
    write_language_model(tmp_path / "fresh", TEXTS, SIZES, matches=False, seed=1)
    out = tmp_path / "aligned"
    course = Course(steps=60, batch=4, lr=1e-2, freezes_ranker=True)
    train_vectors(tmp_path / "ranker", tmp_path / "fresh", out, TEXTS, course)
    before, after = (open_chat(tmp_path / name) for name in ("aligned-start", "aligned"))
    table = before.model.language_model.model.embed_tokens.weight
    means = torch.stack([table[before.tokenizer.encode(text)].mean(0) for text in TEXTS])
    with torch.inference_mode():
        far, near = (
            torch.cosine_similarity(vectors_of(chat.model.modality(ITEM), TEXTS), means).mean()
            for chat in (before, after)
        )
    assert near > 0.9 > 0.4 > far
    learned = after.model.language_model.state_dict()
    for name, weight in before.model.language_model.state_dict().items():
        assert torch.equal(weight, learned[name])


def test_who_gathers_words_does_not_look_at_itself_alone(tmp_path):
    for name, matches in (("matches", True), ("gathers", False)):
        write_language_model(tmp_path / name, TEXTS, SIZES, matches=matches)
    first = {
        name: open_chat(tmp_path / name).model.language_model.model.layers[0].self_attn
        for name in ("matches", "gathers")
    }
    assert torch.equal(first["matches"].q_proj.weight, first["matches"].k_proj.weight)
    assert not torch.equal(first["gathers"].q_proj.weight, first["gathers"].k_proj.weight)
    assert encoder_of(tmp_path)["from"] == str(tmp_path)


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ((0.98, 0.975, 0.99), "**met**"),
        ((0.98, 0.96, 0.99), "**met by the mean, not by its interval**"),
        ((0.96, 0.95, 0.99), "**missed**"),
    ],
)
def test_a_target_is_met_by_the_whole_interval_or_said_not_to_be(found, said):
    assert said in verdict("share", found, 0.97)
