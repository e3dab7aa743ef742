"""The figures in the README are those of the result files."""

import json
import re

from tests.docs.test_code_blocks import REPOSITORY


def test_accuracy_of_pebble() -> None:
    readme = (REPOSITORY / "README.md").read_text("utf-8")
    measured = json.loads((REPOSITORY / "src/lapilli/pebble/accuracy.json").read_text("utf-8"))
    rows = {**measured["questions"], "held-out handwritten digits": measured["held_out_digits"]}
    rows["all questions"] = rows.pop("all")
    for name, tally in rows.items():
        share = 100 * tally["right"] / tally["total"]
        assert f"| {name} | {share:.1f} % | {tally['right']} of {tally['total']} |" in readme


def test_accuracy_of_pebble_in_its_wider_world() -> None:
    guide = (REPOSITORY / "docs/guide/pebble.md").read_text("utf-8")
    measured = json.loads((REPOSITORY / "src/lapilli/pebble/accuracy.json").read_text("utf-8"))
    rows = {
        "2,000 questions": measured["questions"]["all"],
        "handwritten digits never trained on": measured["held_out_digits"],
        **measured["wider"],
    }
    for name, tally in rows.items():
        share = 100 * tally["right"] / tally["total"]
        assert f"| {name} | {share:.1f} % | {tally['right']} of {tally['total']} |" in guide


def test_accuracy_of_the_larger_sibling() -> None:
    guide = (REPOSITORY / "docs/guide/pebble.md").read_text("utf-8")
    section = guide.partition("## A larger sibling")[2]
    results = REPOSITORY / "benchmarks/results/pebble-larger.json"
    of_both = [
        json.loads(path.read_text("utf-8"))
        for path in (REPOSITORY / "src/lapilli/pebble/accuracy.json", results)
    ]
    small, large = (
        {
            **measured["questions"],
            "2,000 questions": measured["questions"]["all"],
            "handwritten digits never trained on": measured["held_out_digits"],
            **measured["wider"],
        }
        for measured in of_both
    )
    for name in small.keys() - {"all"}:
        first, second = (100 * one[name]["right"] / one[name]["total"] for one in (small, large))
        count = f"{large[name]['right']} of {large[name]['total']}"
        assert f"| {name} | {first:.1f} % | {second:.1f} % ({count}) |" in section


def test_what_ranking_costs() -> None:
    guide = (REPOSITORY / "docs/guide/rank.md").read_text("utf-8")
    results = json.loads((REPOSITORY / "benchmarks/results/rank.json").read_text("utf-8"))
    for prefix, measured in results["prefixes"].items():
        ratios = measured["ratios"]
        row = " | ".join(
            f"{ratios[name]:.1f}"
            for name in (
                "vectors to full text alone",
                "vectors to full text",
                "vectors to summaries",
                "sharing, full text",
                "sharing, summaries",
            )
        )
        assert f"| {int(prefix):,} | {row} |" in guide


def test_calibration_of_decisions() -> None:
    guide = (REPOSITORY / "docs/guide/decide.md").read_text("utf-8")
    path = REPOSITORY / "benchmarks/results/decisions.json"
    measured = json.loads(path.read_text("utf-8"))
    assert len(measured["bins"]) > 5
    for row in measured["bins"]:
        said = f"{row['said']:.3f} | {row['so']:.3f} |"
        assert f"| {row['from']:.1f} to {row['to']:.1f} | {row['questions']} | {said}" in guide
    assert f"about {measured['scenes']} fresh scenes" in guide
    assert f"{100 * measured['accuracy']:.1f} %" in guide
    assert f"{measured['expected_calibration_error']:.4f}" in guide


def test_hours_for_a_million_pictures() -> None:
    guide = (REPOSITORY / "docs/guide/scale.md").read_text("utf-8")
    rows = re.findall(
        r"^\| ([SL]): .* \| (\w+) \| ([\d.]+) \| ([\d,]+) \| ([\d.]+) \|$", guide, re.M
    )
    assert len(rows) == 4
    for shape, weights, per_minute, hours, peak in rows:
        results = REPOSITORY / f"benchmarks/results/inference-{shape}.json"
        measured = json.loads(results.read_text("utf-8"))["summary"]["engines"]
        found = measured[f"lapilli {weights}"]
        rate = found["many_whole_tokens_per_s"] / 64  # pictures a second, 64 tokens each
        assert per_minute == f"{60 * rate:.1f}"
        assert hours == f"{1e6 / rate / 3600:,.0f}"
        assert peak == f"{found['many_peak_bytes'] / 1e9:.1f}"


TIMES = "llama-server's time"


def test_what_the_server_bears() -> None:
    guide = (REPOSITORY / "docs/guide/serve.md").read_text("utf-8")
    path = REPOSITORY / "benchmarks/results/serve.json"
    measured = json.loads(path.read_text("utf-8"))
    load, ratio = measured["load"], measured["beside_the_engine"]["ratio"]
    health = measured["health"]
    of_larger, peers = (
        json.loads((path.parent / name).read_text("utf-8"))
        for name in ("serve-S.json", "serve-peers.json")
    )
    ratios = peers["eight"]["ratios"]
    for said in (
        f"{load['requests']:,} answers, {load['errors']} errors, {load['wrong']} wrong",
        f"{load['grown_mib']:.1f} MiB",
        f"every {load['gap_median_ms']:.1f} ms (median) and within {load['gap_p99_ms']:.1f} ms",
        f"ready after {load['ready_s']:.1f} s",
        f"within {health['p99_ms']:.0f} ms\nfor 99 of 100 (median {health['median_ms']:.1f} ms)",
        f"have {of_larger['beside_the_engine']['ratio']:.2f} of the tokens",
        f"and {ratio:.2f} with pebble",
        f"{ratios['llama-server'][0]:.1f} times\nthe tokens a second of llama.cpp's",
        f"and {ratios['transformers serve'][0]:.1f} times those of `transformers serve`",
        f"took {peers['decisions']['400']:.0f} s",
        f"{peers['decisions'][TIMES]:.1f} times as long",
        f"That is {peers['decisions']['of one question and 400 steps']:.1f} times",
        f"they took {peers['decisions']['400 unlike']:.0f} s: "
        f"{peers['decisions']['of one question and 400 steps, unlike']:.1f} times that",
        f"`llama-server` {peers['decisions'][TIMES + ', unlike']:.1f} times as long",
    ):
        assert said in guide, said
