"""`python -m benchmarks.rank`: which figures there are, and that both ways compute the same."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.rank import LABELS, WAYS, Alone, describe, main, make_model, pieces, text
from lapilli.rank import SuffixScorer


def test_both_ways_have_the_same_logits() -> None:
    model = make_model("tiny")
    for way in ("summaries", "vectors"):
        given = pieces(way, 4, 64)
        shared, alone = (
            torch.stack(list(kind(model).logits(text(30, -1), given, LABELS)))
            for kind in (SuffixScorer, Alone)
        )
        torch.testing.assert_close(shared, alone, atol=1e-5, rtol=0)


def test_the_figures_of_a_file_and_for_people(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "rank.json"
    main(["--shape", "tiny", "--items", "3", "--rounds", "1", "--prefixes", "8", "--out", str(out)])
    found = json.loads(out.read_text())
    assert describe(found) in capsys.readouterr().out
    assert tuple(found["prefixes"]["8"]["ways"]) == WAYS
    for row in found["prefixes"]["8"]["ways"].values():
        assert row["items/s"] > 0
