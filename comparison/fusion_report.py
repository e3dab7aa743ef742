"""docs/fusion.md, of what comparison/fusion.py found.

python -m comparison.fusion_report
"""

import json
import statistics
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from comparison.intervals import interval_of_seeds

ROOT: Final = Path(__file__).parents[1]
RESULT: Final = Path(__file__).parent / "results" / "fusion.json"
USERS: Final = Path(__file__).parent / "results" / "userllm.json"
PAGE: Final = ROOT / "docs" / "fusion.md"
FIRST: Final = "tokens"
HEAD: Final = """# Early fusion beside late fusion

Is early fusion better than late fusion? Measured by `make example-fusion`
(`python -m comparison.fusion`), written by `python -m comparison.fusion_report` from [its
result](../comparison/results/fusion.json).

| form | how a language model sees a picture |
|---|---|
| tokens | {features} features through an mlp stand before the text: early fusion, LLaVA |
| soft prompt | a resampler makes 4 of them, which stand there: early fusion of a summary |
| cross-attention | a gated block looks at them before the last of 3 layers: Flamingo, User-LLM |
| ALBEF | 2 layers read the text alone, 2 more look at the picture: late fusion |

All of them learn the same from nothing: {train:,} of pebble's scenes with one to three objects, as
pebble's frozen tower sees them (the mean of 2 x 2 patches), first their captions ({caption_epochs}
epochs), then {questions} questions about each ({question_epochs} epochs), with the same words, in
batches of {batch} scenes, with the same optimizer. An answer is one of the same closed list, chosen
from the state behind the question in every form, by the table that words are read with. In the
first stage the language models learn to write the caption, and ALBEF has its own three objectives:
contrastive alignment before fusion (ITC, a queue of 512), matching with hard negatives (ITM) and
masked words (MLM), with momentum distillation. Nothing was chosen on the test scenes.
"""
LIMITS: Final = """
## Limits

- Models of 0.9 million parameters, a minute of training, drawn pictures, templates for questions.
  What holds here may not hold for models that begin as large language models, which is what LLaVA
  does and what the claim is about: there early fusion inherits what the language model knows, and
  nothing here measures that.
- Training is short: no form has converged, and which of them learns fastest is part of what is
  compared.
- The tower is frozen and the same for all. ALBEF trains its image encoder, and its contrastive loss
  is meant to shape it.
- A closed list of answers suits ALBEF, whose encoder cannot write: the paper needs a decoder for
  that. The other forms can write whole answers, which counts for nothing here.
- Equal epochs are not equal work: a step of ALBEF's pretraining has several passes over its layers.
- Intervals are of three seeds (Student's t with two degrees of freedom). They hold the variation
  of weights and order; scenes are the same for all seeds.
- One learning rate for all, 2e-3. Trials with validation scenes before had shown that *tokens*
  learns with it. Half of it was tried by the first seed of an earlier run for two forms: ALBEF then
  answered 70.4 % of the test questions instead of 66.8 (68.5 instead of 65.8 of the validation's)
  and found 49 of 50 scenes; cross-attention 58.4 instead of 58.8. It was not tried for the other
  two, so the tables hold ALBEF below what it can do. `--rates 1e-3 2e-3` lets the validation split
  choose for all.
- Depths, widths and the place of the cross-attention were not searched for.
- Times are of plain torch in float32, without the engine and its kernels, and of sizes where the
  overhead of each operation counts.
"""


FINDINGS: Final = """
## What was found

- Early fusion is not generally superior here. ALBEF answers as many questions as *tokens* does,
  with nearly as many parameters, the same data and as many epochs: what lies between them is less
  than what these seeds can tell apart, in every skill too.
- Among the forms of one language model, features in the sequence are best: a single block of
  cross-attention stays behind, and four vectors of a fresh resampler hardly carry more than how
  many things there are. Both have a minute to learn where to look; a soft prompt that has learned
  longer may be another one.
- No form has learned relations or yes/no: all are at the most frequent answer. So nothing is said
  here about questions that need several objects at once, where early fusion might help.
- Early fusion costs two and a half times the operations of ALBEF for a new picture, and a fifth
  more for a further question about it. Beside the tower in front of both that is little.
- To find pictures by captions the two differ by how they compare. *Tokens* finds nearly all by
  reading every pair, at a hundred times the operations; ALBEF finds most by a product of vectors.
"""


def runs_of(found: Mapping[str, Any], form: str) -> list[Mapping[str, Any]]:
    """Return the runs of a form with the learning rate that was chosen, seed after seed.

    Of a result that is not complete those that are there.
    """
    keys = [f"{form} | {seed} | {found['rates'][form]:g}" for seed in found["seeds"]]
    return [found["runs"][key] for key in keys if key in found["runs"]]


def shares(runs: Sequence[Mapping[str, Any]], skill: str, split: str = "test") -> list[float]:
    """Return the percentage of right answers of each run."""
    return [100 * run[split][skill][0] / run[split][skill][1] for run in runs]


def _cell(values: Sequence[float], form: str = "{:.1f}") -> str:
    mean, half = interval_of_seeds(values)
    return f"{form.format(mean)} ± {form.format(half)}"


def _section(title: str, text: str) -> str:
    return f"\n## {title}\n\n{textwrap.fill(text, 100)}\n\n"


def _table(columns: Sequence[str], rows: Iterator[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _skills(found: Mapping[str, Any]) -> str:
    skills = [name for name in found["guessed"] if found["guessed"][name][1]]
    skills = ["all", *(name for name in skills if name != "all")]

    def rows() -> Iterator[list[str]]:
        said = found["guessed"]
        guess = [f"{100 * said[name][0] / said[name][1]:.1f}" for name in skills]
        yield ["most frequent answer", *guess]
        for form in found["rates"]:
            runs = runs_of(found, form)
            yield [form, *(_cell(shares(runs, name)) for name in skills)]

    number = found["guessed"]["all"][1]
    return _section(
        "Right answers",
        f"Percent of {number:,} questions about {found['plan']['test']} test scenes: mean of the "
        "seeds and its interval of 95 %.",
    ) + _table(["", *skills], rows())


def differences(found: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """Return what each form has more than early fusion, in points, with the interval by seeds."""
    first = shares(runs_of(found, FIRST), "all")
    return {
        form: interval_of_seeds(
            [b - a for a, b in zip(first, shares(runs_of(found, form), "all"), strict=False)]
        )
        for form in found["rates"]
        if form != FIRST
    }


def _verdict(found: Mapping[str, Any]) -> str:
    lines = []
    for form, (mean, half) in differences(found).items():
        what = "more" if mean > 0 else "fewer"
        sure = "no difference that these seeds can show" if not abs(mean) > half else "beyond it"
        lines.append(
            f"- {form}: {abs(mean):.1f} points {what} right answers than tokens, ± {half:.1f} over "
            f"the seeds: {sure}.\n"
        )
    return "\nBeside tokens, seed by seed:\n\n" + "".join(lines)


def _training(found: Mapping[str, Any]) -> str:
    def rows() -> Iterator[list[str]]:
        for form, rate in found["rates"].items():
            runs = runs_of(found, form)
            spent = [[run["seconds"][kind] for run in runs] for kind in ("captions", "questions")]
            yield [
                form,
                f"{runs[0]['parameters']:,}",
                f"{rate:g}",
                *(f"{statistics.median(of_kind):.0f}" for of_kind in spent),
            ]

    columns = ["", "parameters", "learning rate", "captions, s", "questions, s"]
    every = [run for form in found["rates"] for run in runs_of(found, form)]
    total = sum(sum(run["seconds"].values()) for run in every)
    return _section(
        "Training",
        "Seconds of one core, the median of the seeds, on a machine with much other work on it: "
        f"read their ratios. All {len(every)} trainings, of one run of the command, took "
        f"{total:,.0f} of them.",
    ) + _table(columns, rows())


def _requests(found: Mapping[str, Any]) -> str:
    costs = found["requests"]["forms"]
    first = costs[FIRST]

    def rows() -> Iterator[list[str]]:
        for form, cost in costs.items():
            yield [
                form,
                f"{cost['positions']:.1f}",
                f"{cost['flops'] / 1e6:.1f}",
                f"{cost['flops, known'] / 1e6:.1f}",
                f"{cost['ms'] / first['ms']:.2f}",
                f"{cost['ms, together'] / first['ms, together']:.2f}",
            ]

    columns = ["", "positions", "MFLOP", "MFLOP, picture known", "time", "time, together"]
    tower = found["requests"]["tower"] / 1e6
    return _section(
        "A request",
        "A question about a picture, mean of the test questions. *Picture known*: a further "
        "question, where keys and values of the picture are kept. Times are those of tokens = 1, "
        "medians of turns in one run: a question alone, and one of all questions about a picture "
        f"in one pass. The tower in front of all of them takes {tower:.0f} MFLOP a picture.",
    ) + _table(columns, rows())


def _retrieval(found: Mapping[str, Any]) -> str:
    costs = found["requests"]["forms"]

    def rows() -> Iterator[list[str]]:
        for form in found["rates"]:
            every = [run["retrieval"] for run in runs_of(found, form)]
            again = "recall@1, looked at again"
            recall = _cell([100 * one["recall@1"] for one in every])
            seconds = statistics.median(one["seconds"] for one in every)
            flops = costs[form]["flops, retrieval"] / 1e9
            yield [form, recall, f"{flops:.3f}", f"{seconds:.3f}"]
            if again in every[0]:
                seconds = statistics.median(one[f"seconds, {again[10:]}"] for one in every)
                recall = _cell([100 * one[again] for one in every])
                yield [f"{form}, best 16 matched again (ITM)", recall, "", f"{seconds:.3f}"]

    number = found["plan"]["retrieval"]
    columns = ["", "recall@1, %", "GFLOP", "seconds"]
    return _section(
        "Finding a scene by its caption",
        f"{number} captions, each to find its scene among {number}, after the first stage; "
        f"chance is {100 / number:.0f} %. ALBEF compares vectors that were made of each side "
        "alone: a new caption costs its encoder and a product for each picture. A language model "
        "has to read it behind every picture, and takes its log probability.",
    ) + _table(columns, rows())


def _users(users: Mapping[str, Any] | None) -> str:
    title = "The same for users: ml-100k"
    if users is None:
        return _section(title, "Not measured yet: `make example-userllm` does.").rstrip() + "\n"
    kept = {
        name: row for name, row in users["rows"].items() if name.startswith(("user: ", "SASRec"))
    }

    def rows() -> Iterator[list[str]]:
        for name, row in kept.items():
            cost = row.get("cost", {})
            yield [
                name,
                *(
                    "{:.3f} ({:.3f} to {:.3f})".format(*row["test"][metric])
                    if metric in row["test"]
                    else ""
                    for metric in ("hit", "ndcg")
                ),
                f"{cost['positions']:.0f}" if "positions" in cost else "",
                f"{cost['flops'] / 1e6:.2f}" if "flops" in cost else "",
            ]

    columns = ["", "HR@10", "NDCG@10", "positions", "MFLOP a request"]
    return _section(
        title,
        "The forms in which a language model is told of a user, of docs/userllm.md. SASRec beside "
        "them is late fusion: a state of the user and a vector of every film, made apart and "
        "compared by a product.",
    ) + _table(columns, rows())


def page(found: Mapping[str, Any], users: Mapping[str, Any] | None) -> str:
    """Return the page.

    Args:
        found: the result of comparison/fusion.py.
        users: that of comparison/userllm.py; None: there is none.
    """
    head = HEAD.format(features=found["requests"]["features"], **found["plan"])
    parts = [head, _skills(found), _verdict(found), _requests(found), _retrieval(found)]
    return "".join([*parts, _training(found), _users(users), FINDINGS, LIMITS])


def write(result: Path = RESULT) -> str:
    """Write docs/fusion.md and return it."""
    found = json.loads(result.read_text(encoding="utf-8"))
    users = json.loads(USERS.read_text(encoding="utf-8")) if USERS.exists() else None
    text = page(found, users)
    PAGE.write_text(text, encoding="utf-8")
    return text


if __name__ == "__main__":
    write()
