"""Cranfield's comparison: the whole program on a few abstracts in SMART's layout, and its parts."""

import os
from dataclasses import replace

import numpy as np
import pytest
import torch

from comparison import mixlm
from comparison.abstracts import (
    FILES,
    Abstracts,
    Parts,
    Ranking,
    read_cranfield,
    scored,
    sentences_of,
)
from comparison.cranfield import (
    BESIDE,
    BM25,
    EMBEDDING,
    TEXT,
    TOWERS,
    ContrastTask,
    CranfieldComparison,
    Towers,
    unit_vectors,
)
from comparison.language_model import Sizes, write_language_model
from comparison.mixlm_report import cranfield_table, page
from comparison.movies import data_folder
from comparison.rankers import Course, open_chat, train_task
from lapilli.rank.mixlm import RankingExample

TEXTS = ["the lift of a wing", "the heat of a long thin shell in air", "load"]
SIZES = Sizes(vocabulary=500, width=32, inner=48, layers=1, heads=2)
THINGS = ("wing", "shell", "plate", "nozzle", "cone", "rotor", "jet", "wake", "slab", "tail")
WHAT = ("heat", "load", "lift", "shock", "flutter")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with fifty abstracts and ten queries in the layout of SMART."""
    found = tmp_path_factory.mktemp("cranfield")
    texts, queries, judged = [], [], []
    for number in range(50):
        thing, what = THINGS[number // 5], WHAT[number % 5]
        title = f"the {what} of a {thing} ."
        body = (
            f"{title}\n  it was measured how much {what} the {thing} of a fast model has in air .\n"
            f"an old theory of the {thing} says no more than that it is small in most cases ."
        )
        texts.append(f".I {number + 1}\n.T\n{title}\n.A\nnobody\n.B\nnowhere\n.W\n{body}\n")
    for number, thing in enumerate(THINGS):
        what = WHAT[number % 5]
        queries.append(f".I {10 * number:03}\n.W\nhow much {what} has the {thing} .\n")
        own = 5 * number + number % 5 + 1
        judged += [f"{number + 1} {own} 1", f"{number + 1} {5 * number + 1 + (own % 5)} 4"]
        judged.append(f"{number + 1} {(own + 20) % 50 + 1} -1")
    for name, lines in zip(FILES, (texts, queries, judged), strict=True):
        (found / name).write_text("\n".join(lines) + "\n")
    return found


@pytest.fixture(scope="module")
def base(folder):
    texts = [one.whole for one in read_cranfield(folder).documents.values()]
    return write_language_model(folder / "base", [*texts, "query: item: match? yes no"] * 2, SIZES)


def abstracts(folder, **sizes):
    return Abstracts(read_cranfield(folder), Parts(train=3, validation=3, **sizes))


def test_the_program_writes_every_row(folder, base, tmp_path):
    plan = mixlm.QUICK_CRANFIELD
    saved = []
    comparison = CranfieldComparison(read_cranfield(folder), plan, base, tmp_path, saved.append)
    found = comparison.run()
    rows = found["rows"]
    names = [name + beside for name in (TOWERS, TEXT, EMBEDDING) for beside in ("", BESIDE)]
    assert list(rows) == [BM25, *names]
    assert saved[-1] == found
    for name, row in rows.items():
        mean, low, high = row["ndcg"]
        assert 0 <= low <= mean <= high <= 1
        assert row["above BM25"][0] == pytest.approx(mean - rows[BM25]["ndcg"][0])
        assert f"| {name} |" in cranfield_table(rows)
        assert f"| {name} |" in page({"cranfield": found})
    teacher = found["about"]["teacher"]
    assert rows[f"{teacher}{BESIDE}"]["validation"] == max(
        rows[f"{name}{BESIDE}"]["validation"] for name in (TEXT, TOWERS)
    )
    share = rows[f"{EMBEDDING}{BESIDE}"]["of teacher"][0]
    ratio = rows[f"{EMBEDDING}{BESIDE}"]["ndcg"][0] / rows[f"{teacher}{BESIDE}"]["ndcg"][0]
    assert share == pytest.approx(ratio)
    assert rows[EMBEDDING]["positions"] == plan.vectors < rows[TEXT]["positions"]
    assert rows[EMBEDDING]["flops"] < rows[TEXT]["flops"]
    assert {"stage I", TEXT, EMBEDDING, "store"} <= set(found["seconds"])


def test_a_query_is_in_one_part_and_those_of_the_test_are_not_learned_from(folder):
    found = abstracts(folder)
    parts = [found.train, found.validation, found.test]
    assert sorted(name for part in parts for name in part) == sorted(found.queries)
    learned = {example.query for example in found.examples(60)}
    assert {found.queries[name] for name in found.train} <= learned
    for name in (*found.validation, *found.test):
        assert found.queries[name] not in learned


def test_what_is_not_known_to_answer_has_the_grade_0(folder):
    found = abstracts(folder)
    for example in found.judged_examples(found.train):
        thing = example.query.split()[-2]
        assert example.label in (0, 0.25, 1)
        if example.label:
            assert thing in example.item


def test_a_query_made_of_an_abstract_does_not_stand_in_its_text(folder):
    found = abstracts(folder, words=12)
    made = found.pairs(60)
    for query, place, text in made:
        assert query not in text
        assert any(thing in query for thing in THINGS)
        assert set(found.texts[place].split()) & set(text.split())
    assert any(text == found.texts[place] for _, place, text in made)
    assert any(text != found.texts[place] for _, place, text in made)


def test_own_texts_are_right_and_others_wrong(folder):
    found = abstracts(folder, words=12)
    for right, near, far in zip(*[iter(found.made_examples(30))] * 3, strict=True):
        assert (right.label, near.label, far.label) == (1, 0, 0)
        assert right.query == near.query == far.query
        assert right.item not in (near.item, far.item)


def test_the_judged_order_is_the_best_and_bm25_weighs_what_the_validation_says(folder):
    found = abstracts(folder)
    right = scored(
        found, lambda query, first: np.array([right_one(found, query, i) for i in first])
    )
    assert right.ndcgs(found.validation) == pytest.approx(1)
    assert right.ndcgs(found.test) == pytest.approx(1)
    wrong = Ranking(found, {name: -scores for name, scores in right.scores.items()})
    assert wrong.ndcgs(found.test).mean() < 0.5
    words = scored(found, lambda query, first: found.words(query)[first])
    beside = wrong.beside_bm25()
    best = max(words.ndcgs(found.validation).mean(), wrong.ndcgs(found.validation).mean())
    assert beside.ndcgs(found.validation).mean() >= best
    assert replace(wrong, weight=0.0).ndcgs(found.test) == pytest.approx(words.ndcgs(found.test))


def right_one(found, query, place):
    """Return the grade of a text."""
    [name] = [one for one, text in found.queries.items() if text == query]
    return found._judgements[name].get(found.names[place], 0.0)


def test_a_query_finds_its_text_after_stage_one(folder, base, tmp_path):
    both = [(what, thing) for what in WHAT for thing in THINGS]
    pairs = [(f"how much {what} has a {thing}", f"{what} {thing}") for what, thing in both]
    course = Course(steps=60, batch=25, lr=3e-3)
    train_task(base, tmp_path / "out", lambda chat: ContrastTask(chat, pairs, 25), course)

    def found(where):
        chat = open_chat(where)
        with torch.inference_mode():
            queries = unit_vectors(chat, [query for query, _ in pairs])
            texts = unit_vectors(chat, [text for _, text in pairs])
        return ((queries @ texts.T).argmax(1) == torch.arange(len(pairs))).float().mean()

    assert found(tmp_path / "out") > found(base) + 0.1


def test_a_bi_encoder_teaches_probabilities_in_the_order_of_its_cosines(base):
    towers = Towers(open_chat(base), TEXTS)
    cosines = towers.cosines("lift of a wing")
    items = [*TEXTS, "a text that is not one of them"]
    examples = towers.taught([RankingExample("lift of a wing", item, 0.0) for item in items])
    found = np.array([example.teacher for example in examples])
    assert np.argsort(found[:-1]).tolist() == np.argsort(cosines).tolist()
    odds = found[:-1] / (1 - found[:-1])
    assert odds.sum() == pytest.approx(len(TEXTS) / 10, rel=1e-3)
    assert 0 < found[-1] < 1


def test_a_vector_does_not_depend_on_the_texts_beside_it(base):
    chat = open_chat(base)
    with torch.inference_mode():
        together = unit_vectors(chat, TEXTS)
        alone = torch.cat([unit_vectors(chat, [text]) for text in TEXTS])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


def test_sentences_are_told_by_their_full_stop():
    text = "one two three . four five six seven eight nine ten .  short one ."
    assert sentences_of(text, least=3) == ["one two three", "four five six seven eight nine ten"]


def test_without_the_data_the_program_says_where_they_go(tmp_path, monkeypatch, capsys):
    out = ["--part", "cranfield", "--out", str(tmp_path / "out.json"), "--data", str(tmp_path)]
    mixlm.main(out)
    assert f"not in {tmp_path / 'cranfield'}: put {FILES[0]}" in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()


def test_cranfield_has_the_queries_and_grades_that_the_page_says():
    folder = data_folder(os.environ.get("LAPILLI_DATA")) / "cranfield"
    collection = read_cranfield(folder)
    if collection is None:
        pytest.skip(f"Cranfield is not in {folder}")
    found = Abstracts(collection, Parts())
    assert (len(found.names), len(found.queries)) == (1398, 225)
    assert (len(found.train), len(found.validation), len(found.test)) == (50, 25, 150)
    words = Ranking(found, scored(found, lambda query, first: found.words(query)[first]).scores)
    assert words.ndcgs(found.test).mean() == pytest.approx(0.3505, abs=0.01)
