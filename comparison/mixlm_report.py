"""docs/mixlm.md, of what comparison/mixlm.py found: `python -m comparison.mixlm_report`."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from comparison.shop import EMBEDDING, TEACHER

PAGE: Final = Path(__file__).parents[1] / "docs" / "mixlm.md"
RESULT: Final = Path(__file__).parent / "results" / "mixlm.json"

HEAD: Final = """# MixLM at a small size

Measured by `make example-mixlm` (`python -m comparison.mixlm`), written by
`python -m comparison.mixlm_report` from [its result](../comparison/results/mixlm.json).
[Train rankers](guide/train_rankers.md) says what the stages are. Intervals are 95 % of the
bootstrap over queries, each with one training run.
"""
SHOP: Final = """
## A generated shop

An item is six values out of eight each, and its text is a line of them, such as *chair, red, oak,
modern, kitchen, tiny*. A query wants four values, and a grade is how many of them an item has.
Queries and items of the test are drawn apart from those of training; {overlap} of the {items} items
have values that an item of training has too. Each of {queries} queries ranks {candidates} items,
half of them the best of all; gains are exponential.

The model is new: a Qwen3 of {parameters:,} parameters with a tokenizer trained on the texts. Stage
I are queries and items that say behind each value whether it is wanted. The text ranker and the
ranker of an item's first word, which costs as many positions as a vector, begin there. The
encoder of the embedding ranker begins as the text ranker and learns from labels, the text ranker's
probabilities and its hidden states, while the ranker is frozen: where both learned at once at the
same rate, what the ranker said of texts and of vectors became equal within twenty steps and no
better than a constant. Both towers of the bi-encoder begin as the text ranker too and learn from
the same labels. The vectors of the test's items are read from a store on disk, one for each item.
"""
AFTER_SHOP: Final = """
*Positions* are those of the item, without the question behind it that all have. Operations and
items a second are those of an item behind a query that was read; speeds are of one run, in turns,
on one core: read the ratios. A query names its values by the words of the text, so that BM25 has
little to miss here, and a grade is a sum, which the cosine of two vectors can be: this shop shows
what is lost between a text and a vector, not what a language model knows. Texts are short, so that
a quarter of an hour of one core is enough; MixLM's have 900 tokens. `ShopPlan(fillers=4)` makes
descriptions of some 60 tokens: of those the text ranker had learned nothing after 130 steps, and
they were given up.
"""
ABLATIONS: Final = """
### What the parts of stage III do

The same stage for {steps} steps, with a part left out.

"""
CRANFIELD: Final = """
## Cranfield

1,400 abstracts, 225 queries, judged by people. Each ranker reorders the first hundred that BM25
finds by title and abstract; NDCG@10 has exponential gains and all judged texts in its best order.
{test} queries are the test and {validation} the validation, drawn at random.

The rankers read titles alone, which are short enough to learn from in minutes. Judgements teach
nothing here: stage I asks of words whether they stand in a sentence of an abstract, stages II and
III learn from such sentences as queries and from a judge without labels, the mean of the z-scores
that BM25 and latent semantic analysis give to titles. Embeddings of tokens begin as what latent
semantics makes of them. *and BM25* adds the z-scores of a row's score and of BM25's, with the
weight that validation prefers ({weights}).
"""


def tables(found: Mapping[str, Any]) -> str:
    """Return the tables of all parts."""
    parts = []
    if "shop" in found:
        parts.append(shop_table(found["shop"]["rows"]))
        if found["shop"]["ablations"]:
            parts.append(ablation_table(found["shop"]["ablations"]))
    if "cranfield" in found:
        parts.append(cranfield_table(found["cranfield"]["rows"]))
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


def ablation_table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Return quality of stage III without its parts."""
    lines = ["| stage III | NDCG@10 | of the teacher's |", "|---|---|---|"]
    lines += [
        f"| {name} | {spread(row['ndcg'])} | {share(row.get('of teacher'))} |"
        for name, row in rows.items()
    ]
    return "\n".join(lines) + "\n"


def cranfield_table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Return quality of every way to rerank."""
    lines = ["| | NDCG@10 | above BM25 | of the text ranker's |", "|---|---|---|---|"]
    for name, row in rows.items():
        above = spread(row["above BM25"], signed=True) if name != "BM25" else ""
        cells = [spread(row["ndcg"]), above, share(row.get("of teacher"))]
        lines.append(f"| {name} | {' | '.join(cells)} |")
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
    said = "met" if found[0] >= target else "missed"
    return f"{what}: {share(found)}, target {100 * target:.0f} %: **{said}**.\n"


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
        parts.append(unmeasured(shop["rows"], (TEACHER, EMBEDDING, "bi-encoder")))
        if EMBEDDING in shop["rows"]:
            kept = shop["rows"][EMBEDDING]["of teacher"]
            parts += ["\n", verdict("The embedding ranker's share of its teacher", kept, 0.97)]
        if shop["ablations"]:
            parts += [ABLATIONS.format(**shop["about"]), ablation_table(shop["ablations"])]
    if "cranfield" in found:
        part = found["cranfield"]
        weights = ", ".join(f"{name}: {one}" for name, one in part["weights"].items())
        parts += [CRANFIELD.format(**part["queries"], weights=weights), "\n"]
        parts.append(cranfield_table(part["rows"]))
        parts.append(unmeasured(part["rows"], (TEXT, RERANKER)))
        best = part["rows"].get(f"{RERANKER} and BM25")
        if best:
            above = part["rows"][f"{TEXT} and BM25"]["above BM25"]
            said = "met" if above[0] > 0 else "missed"
            parts += [f"\nThe text ranker above BM25: {spread(above, signed=True)}: **{said}**.\n"]
            parts += ["\n", verdict("The embedding ranker's share", best["of teacher"], 0.95)]
    return "".join(parts)


def main() -> None:
    """Write the page."""
    PAGE.write_text(page(json.loads(RESULT.read_text(encoding="utf-8"))), encoding="utf-8")


if __name__ == "__main__":
    main()
