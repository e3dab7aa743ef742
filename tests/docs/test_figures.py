"""The figures in the README are those of the result files."""

import json

from tests.docs.test_code_blocks import REPOSITORY


def test_accuracy_of_pebble() -> None:
    readme = (REPOSITORY / "README.md").read_text("utf-8")
    measured = json.loads((REPOSITORY / "src/lapilli/pebble/accuracy.json").read_text("utf-8"))
    rows = {**measured["questions"], "held-out handwritten digits": measured["held_out_digits"]}
    rows["all questions"] = rows.pop("all")
    rows.update(measured["wider"])
    for name, tally in rows.items():
        share = 100 * tally["right"] / tally["total"]
        assert f"| {name} | {share:.1f} % | {tally['right']} of {tally['total']} |" in readme
