"""docs/userllm.md, of what comparison/userllm.py found.

python -m comparison.userllm_report
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).parents[1]
RESULT: Final = Path(__file__).parent / "results" / "userllm.json"
PAGE: Final = ROOT / "docs" / "userllm.md"
SEQUENCE: Final = "SASRec"
TEXT: Final = "text of 50 events"
_COLUMNS: Final = (
    *("", "HR@10", "NDCG@10", "validation", "seeds"),
    *("positions", "MFLOP a request", "of text"),
)
HEAD: Final = """# A user as a few vectors

Measured by `make example-userllm` (`python -m comparison.userllm`), written by
`python -m comparison.userllm_report` from
[its result](../comparison/results/userllm.json).
"""


TRIED: Final = """Tried before, with one seed each, and judged by the validation (NDCG@10 / HR@10):

- the encoder with pieces of histories cut once, events as in the file and the whole catalogue in
  its softmax, 40 epochs in batches of 32: 0.115 / 0.222
- the same cut elsewhere in each epoch, batches of 64: 0.108 / 0.213
- that with the week of each event as a feature: 0.109 / 0.214 after 8 epochs and falling after it,
  so ended after 24; 0.105 / 0.199 with 12 epochs and a rate that ends at nothing
- ties in an order of chance and watched films left out, 20 epochs in batches of 32: 0.117 / 0.212,
  which was taken
- a form begun as the second of these encoders, at 0.108 / 0.213, with dropout in the language model
  and all places of a history as targets: 0.105 / 0.199 after 120 steps; hence the gentle course and
  the look at the validation before its first step
- forms with a fresh projector, 1,200 steps and the last weights, behind the first of these
  encoders: 0.091 to 0.108 / 0.178 to 0.208
"""


def table(found: Mapping[str, Any]) -> str:
    """Return the rows as a table, what each request costs beside how well it ranks."""
    rows = found["rows"]
    text = rows.get(TEXT, {}).get("cost", {}).get("flops")
    lines = [_line(_COLUMNS), _line(["---"] * len(_COLUMNS))]
    lines += [_line(_cells(name, row, text)) for name, row in rows.items()]
    return "\n".join(lines) + "\n"


def _cells(name: str, row: Mapping[str, Any], text: float | None) -> Iterator[str]:
    yield name
    for metric in ("hit", "ndcg"):
        yield "{:.3f} ({:.3f} to {:.3f})".format(*row["test"][metric])
    yield "{hit:.3f} / {ndcg:.3f}".format(**row["validation"])
    yield str(row["seeds"])
    cost = row["cost"]
    yield f"{cost['positions']:.0f}" if "positions" in cost else ""
    yield f"{cost['flops'] / 1e6:.2f}" if "flops" in cost else ""
    yield f"1 / {text / cost['flops']:.1f}" if text and "flops" in cost else ""


def _line(cells: Sequence[str] | Iterator[str]) -> str:
    return f"| {' | '.join(cells)} |"


def differences(found: Mapping[str, Any], other: str) -> str:
    """Return a table of how much each row is better than another one, for the same users."""
    lines = [
        _line(("", "HR@10", "NDCG@10")),
        _line(["---"] * 3),
    ]
    for name, row in found["rows"].items():
        against = row["against"].get(other)
        if against:
            cells = ["{:+.3f} ({:+.3f} to {:+.3f})".format(*against[m]) for m in ("hit", "ndcg")]
            lines.append(_line([name, *cells]))
    return "\n".join(lines) + "\n"


def best_form(found: Mapping[str, Any]) -> str:
    """Return the form that reads users and is the best by the validation alone."""
    rows = {name: row for name, row in found["rows"].items() if name.startswith("user: ")}
    best: str = max(rows, key=lambda name: rows[name]["validation"]["ndcg"])
    return best


def targets(found: Mapping[str, Any]) -> str:
    """Return a table of what the best form was to reach, and whether it did."""
    rows, best = found["rows"], best_form(found)
    mine = rows[best]
    lines = [_line(("", "HR@10", "NDCG@10", "reached")), _line(["---"] * 4)]
    for other in (one for one in ("popularity", "item-kNN", SEQUENCE, TEXT) if one in rows):
        theirs = rows[other]["test"]
        above = [mine["test"][m][0] - theirs[m][0] for m in ("hit", "ndcg")]
        reached = all(one >= 0 if other == TEXT else one > 0 for one in above)
        wanted = "not below" if other == TEXT else "above"
        cells = [f"{theirs[m][0]:.3f}" for m in ("hit", "ndcg")]
        lines.append(_line([f"{wanted} {other}", *cells, "yes" if reached else "no"]))
    share = rows[TEXT]["cost"]["flops"] / mine["cost"]["flops"]
    cells = [f"20 times fewer operations than {TEXT}", "", "", f"{share:.1f} times"]
    lines.append(_line(cells))
    return "\n".join(lines) + "\n"


def latencies(found: Mapping[str, Any]) -> str:
    """Return a table of milliseconds."""
    times = found["milliseconds"]
    lines = [_line(("one request", "ms", "of text")), _line(["---"] * 3)]
    for name, value in times.items():
        lines.append(_line([name, f"{value:.2f}", f"1 / {times[TEXT] / value:.1f}"]))
    return "\n".join(lines) + "\n"


def page(found: Mapping[str, Any]) -> str:
    """Return the page."""
    parts = [HEAD, _about(found), table(found)]
    parts += ["\n## Targets\n\n", _chosen(found), targets(found)]
    for other in (SEQUENCE, TEXT):
        if other in found["rows"]:
            parts += [f"\n## Against {other}, user by user\n\n", _DIFFERENCES]
            parts.append(differences(found, other))
    if "milliseconds" in found:
        parts += ["\n## Time\n\n", _TIMES, latencies(found)]
    parts += ["\n## How it was done\n\n", _how(found)]
    return "".join(parts)


_DIFFERENCES: Final = """The difference of means, and where 95 % of bootstrap samples of the users
put it. An interval around 0 tells nothing apart.

"""
_TIMES: Final = """Medians of the processor time of requests that take turns in one run: prompt in,
scores of all films out. A model of this size spends most of it on calls, not on products. The
user's vectors are there before; the last row is what makes them, once.

"""


def _about(found: Mapping[str, Any]) -> str:
    data = found["data"]
    return f"""
{data["name"]}: {data["users"]} users, {data["films"]:,} films, {data["events"]:,} ratings. The last
film of a user is to be found among all films that the user has not rated; none is sampled. The
second last one is the validation that choices go by; what a row reads of a user is the last
{data["window"]} events before the film. HR@10 and NDCG@10 with 95 % intervals of a bootstrap
over users, the mean over seeds where there are several; under *validation* the two without.

"""


def _chosen(found: Mapping[str, Any]) -> str:
    best = best_form(found)
    hit, ndcg = (found["rows"][best]["test"][m][0] for m in ("hit", "ndcg"))
    return f"""By the validation the best form is *{best.removeprefix("user: ")}*. It has HR@10
{hit:.3f} and NDCG@10 {ndcg:.3f} on the test; means are compared here, and the intervals below say
which differences could be chance.

"""


def _unchanged(rows: Mapping[str, Any]) -> str:
    """Return a sentence on the forms that stayed the encoder that they began as, if there are."""
    seeds = rows.get("encoder alone", {}).get("each seed", [])
    same = [
        name.removeprefix("user: ")
        for name, row in rows.items()
        if name.startswith("user: ") and row["each seed"] == seeds[: len(row["each seed"])]
    ]
    if not same:
        return ""
    return f"""
The look before the first step was the best of {"; ".join(same)}: learning on added nothing there,
and these rows are those of their encoders.
"""


def _how(found: Mapping[str, Any]) -> str:
    options, costs = found["options"], found["rows"]
    form = next((row for row in costs.values() if "encoder_flops" in row["cost"]), None)
    apart = f"{form['cost']['encoder_flops'] / 1e6:.1f}" if form else "?"
    sizes = f"{options['layers']} layers of width {options['width']}"
    return f"""The language model has {sizes}, and words for films, titles and ratings; it begins
with random weights and reads the training histories as text ({options["text steps"]} steps), which
makes the row of the text. The encoder of events (film, genres, years, rating) is as wide and
learns next events alone, {options["encoder epochs"]:.0f} epochs. Histories are cut elsewhere in
each epoch, and events of one user at one time, three quarters of all, take an order of chance in
each, because the data give them none. Films that a user has watched are left out of the softmax of
encoder and forms, as they are left out of the ranking. SASRec ({options["SASRec epochs"]} epochs)
learns from histories in the order of the file and from the whole catalogue, as it is published.

Three forms bring together what has never met: the states behind a user's last
{options["tokens"]} events (soft prompt: {options["tokens"]} learned queries over all states) stand
in the prompt, or beside it before gated cross-attention, behind a fresh projector, and language
model, projector and encoder learn together ({options["form steps"]} steps). The form *tokens*
begins as its encoder instead: the projector is the encoder's head of films, the films' words are
its table, and what the layers of the language model add is nothing at first; so it loses what those
layers and words had learned from text, and keeps the other words. It then learns gently
({options["gentle steps"]} steps at a fifth of the rate), all of it or a part of it. The scores of
all films are the logits of their words after one pass.

Every trained row but HLLM ({options["item steps"]} steps) keeps the weights that the validation's
NDCG@10 found best among those that were looked at: SASRec every ten epochs, the encoder every
four, the text every 150 steps, forms every 50 and before the first. Nothing was chosen by the test.
{_unchanged(costs)}
{TRIED}
Operations are those of `lapilli.plan.flops.request_flops`. They leave out the encoder, whose
{apart} MFLOP are spent once when a user does something, and not when somebody asks.

{_seconds(found)}
"""


def _seconds(found: Mapping[str, Any]) -> str:
    total = sum(found["seconds"].values())
    parts = ", ".join(f"{name} {value:.0f}" for name, value in found["seconds"].items())
    return f"Processor seconds of one core, {total:.0f} in all: {parts}."


def main() -> None:
    """Write the page from the result."""
    PAGE.write_text(page(json.loads(RESULT.read_text(encoding="utf-8"))), encoding="utf-8")


if __name__ == "__main__":
    main()
