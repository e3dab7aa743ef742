"""MixLM's comparison: the whole program at toy sizes, and what its parts are made of."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from comparison import mixlm
from comparison.cranfield import Collection, CranfieldPlan, sentences_of, standard
from comparison.generated import ASKED, ATTRIBUTES
from comparison.intervals import difference_interval, interval, ratio_interval
from comparison.language_model import Sizes, latent_semantics, token_counts, write_language_model
from comparison.mixlm_report import page, tables
from comparison.rankers import ReasoningTask, item_flops, open_chat
from comparison.shop import ABLATIONS, EMBEDDING, TEACHER, Shop
from lapilli.checkpoint.export import save_loaded
from lapilli.checkpoint.load import load_checkpoint
from lapilli.datasets.retrieval import Document, Retrieval

VALUES = {word for values in ATTRIBUTES.values() for word in values}
SIZES = Sizes(vocabulary=400, width=32, inner=48, layers=1, heads=2)
TEXTS = ["a wing in a stream of air", "the heat of a wing", "a shell under load", "load on a shell"]


def test_the_program_writes_every_row_of_the_shop(tmp_path, capsys):
    out = tmp_path / "mixlm.json"
    mixlm.main(["--quick", "--ablations", "--out", str(out), "--data", str(tmp_path)])
    said, missing = capsys.readouterr()
    assert "has no Cranfield: put cran.all.1400" in missing
    found = json.loads(out.read_text())["shop"]
    assert set(found["ablations"]) == set(ABLATIONS)
    assert {"random order", "bi-encoder", TEACHER, EMBEDDING} <= set(found["rows"])
    assert all(0 <= row["ndcg"][0] <= 1 for row in found["rows"].values())
    assert found["rows"][EMBEDDING]["positions"] == 1 < found["rows"][TEACHER]["positions"]
    assert found["rows"][TEACHER]["of teacher"] == pytest.approx([1, 1, 1])
    for name in found["rows"]:
        assert f"| {name} |" in said
        assert f"| {name} |" in page({"shop": found})
    assert tables({"shop": found}).count("\n|") >= len(found["rows"]) + len(ABLATIONS)


def test_a_reason_says_what_is_wanted_and_grades_agree():
    shop = Shop(mixlm.QUICK_SHOP, test=1)
    for record in shop.records(20):
        query = record[0][0]
        for (word, learned), (answer, answer_learned) in zip(
            record[1::2], record[2::2], strict=True
        ):
            assert (learned, answer_learned) == (False, True)
            assert (answer == "yes") == (f" {word}" in query)
    for query, item in shop.pairs(20):
        shared = sum(word in query.text for word in item.words)
        assert query.grade(item) == shared <= ASKED


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
        grade = sum(word in example.query for word in set(words) & VALUES)
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


def test_words_of_like_texts_begin_with_like_vectors(tmp_path):
    write_language_model(tmp_path / "fresh", TEXTS * 3, SIZES, meanings=2)
    chat = open_chat(tmp_path / "fresh")
    table = torch.nn.functional.normalize(chat.model.language_model.model.embed_tokens.weight)
    torch.testing.assert_close(
        chat.model.language_model.model.embed_tokens.weight.norm(dim=-1),
        torch.full((len(table),), 32**0.5),
    )
    of = {word: chat.tokenizer.encode(word)[-1] for word in ("wing", "heat", "shell", "load")}
    like = table[of["shell"], :2] @ table[of["load"], :2]
    unlike = table[of["shell"], :2] @ table[of["heat"], :2]
    assert like > unlike


def test_latent_semantics_finds_texts_without_a_common_word():
    rows = [[0, 1], [1, 2], [2, 0], [3, 4], [4, 5], [5, 3]]
    vectors, tokens = latent_semantics(token_counts(rows, 6), 2)
    assert vectors[0] @ vectors[1] > 0.9 > 0.1 > abs(vectors[0] @ vectors[3])
    assert tokens.shape == (6, 2)


def test_an_item_behind_a_longer_prefix_costs_its_attention_more(tmp_path):
    write_language_model(tmp_path / "fresh", TEXTS, SIZES)
    text = open_chat(tmp_path / "fresh").config.text
    one, more, behind = (item_flops(text, *both) for both in ((10, 1), (10, 5), (100, 1)))
    linear = 2 * text.num_layers * sum(a * b for a, b in text.linear_widths)
    heads = 4 * text.num_layers * text.num_heads * text.head_dim
    assert one == linear + heads * (11**2 - 10**2)
    assert more == 5 * linear + heads * (15**2 - 10**2)
    assert one < behind == linear + heads * (101**2 - 100**2)


def test_intervals_hold_their_means_and_pair_their_queries():
    values = np.random.default_rng(0).random(50)
    mean, low, high = interval(values)
    assert low < mean == values.mean() < high
    assert ratio_interval(values * 0.5, values) == pytest.approx((0.5, 0.5, 0.5))
    assert difference_interval(values + 0.25, values) == pytest.approx((0.25, 0.25, 0.25))


def documents():
    return [f"{text} and {i} more words ." for i, text in enumerate(TEXTS)]


def collection():
    known = {str(i): Document("", text) for i, text in enumerate(documents())}
    known["empty"] = Document("", "")
    queries = {"1": "air around a wing", "2": "a shell", "3": "heat"}
    judged = {"1": {"0": 4.0, "1": 1.0}, "2": {"2": 3.0}, "3": {"1": 2.0}}
    plan = CranfieldPlan(validation=1, meanings=2)
    letters = sorted(set("".join(TEXTS)))
    return Collection(
        Retrieval(known, queries, judged),
        plan,
        lambda text: [letters.index(letter) for letter in text if letter in letters],
        len(letters),
    )


def test_queries_are_in_one_part_and_texts_that_say_nothing_in_none():
    found = collection()
    parts = [found.validation, found.test]
    assert sorted(name for part in parts for name in part) == ["1", "2", "3"]
    assert found.names == ["0", "1", "2", "3"]


def test_scores_of_the_judged_order_are_the_best():
    found = collection()
    first = found.first(found.queries["1"])
    judged = {"0": 4.0, "1": 1.0}
    right = np.array([judged.get(found.names[i], 0.0) for i in first])
    assert found.ndcg("1", right) == pytest.approx(1.0)
    assert found.ndcg("1", -right) < 0.7


def test_a_record_asks_whether_words_are_in_the_query():
    for record in collection().records(20):
        query = record[0][0].removeprefix("query: ").removesuffix("\nitem:").split()
        for (word, _), (answer, _) in zip(record[1::2], record[2::2], strict=True):
            assert (answer == "yes") == (word in query)


def test_examples_are_titles_of_other_texts_with_the_grades_of_the_judge():
    found = collection()
    for example in found.examples(16):
        place = found.titles.index(example.item)
        assert example.label == pytest.approx(found.judge(example.query)[place])
        assert example.query not in documents()[place]


def test_sentences_and_standard_scores():
    assert sentences_of("one two three . four five six seven .", least=3, most=3) == [
        "one two three"
    ]
    scores = standard(np.array([1.0, 2.0, 6.0]))
    assert scores.mean() == pytest.approx(0)
    assert scores.std() == pytest.approx(1)
    assert not standard(np.zeros(3)).any()
