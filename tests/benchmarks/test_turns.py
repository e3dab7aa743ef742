"""`python -m benchmarks.turns`: what a further turn computes, and which figures there are."""

import json
from pathlib import Path

import pytest

import lapilli
from benchmarks.checkpoint import with_pictures, write_checkpoint, write_quantized
from benchmarks.turns import converse, describe, growth, histories, load, main


@pytest.fixture(scope="module")
def pebble() -> lapilli.Chat:
    return load("pebble", None)


def test_a_turn_computes_what_is_new_in_it(pebble: lapilli.Chat) -> None:
    first, *later = converse(pebble, 1, turns=6, tokens=9)
    assert first["computed"] == first["new"] == first["prompt"]
    for turn in later:
        assert turn["computed"] == turn["new"] < turn["prompt"] / 2


def test_a_question_computes_itself_whatever_was_before(pebble: lapilli.Chat) -> None:
    found = histories(pebble, longest=64, rounds=1)
    assert [(row["history"], row["computed"]) for row in found] == [(16, 32), (32, 32), (64, 32)]


def test_the_figures_of_a_file_and_for_people(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "turns.json"
    wanted = ["--turns", "2", "--rounds", "1", "--new-tokens", "2", "--longest", "16"]
    main([*wanted, "--out", str(out)])
    found = json.loads(out.read_text())
    assert describe(found) in capsys.readouterr().out
    found["conversations"]["9"] = found["conversations"].pop("64") | {"visual positions": 9}
    out.write_text(json.dumps(found))
    main([*wanted, "--out", str(out)])
    found = json.loads(out.read_text())
    assert list(found["conversations"]) == ["9", "64"]
    assert "computed beyond what is new: 0" in describe(found)


def test_growth_leaves_single_turns_aside() -> None:
    assert growth([9.0, 1.0, 1.0, 7.0, 5.0, 2.0, 2.0, 8.0]) == 2.0
    assert growth([9.0, 1.0, 1.5]) == 1.0


@pytest.mark.slow
def test_pictures_of_other_sizes(tmp_path: Path) -> None:
    source = write_checkpoint("tiny", tmp_path / "float")
    packed = write_quantized(source, tmp_path / "int4", 4)
    counts = {}
    for name, side in (("small", 112), ("anyres", 112)):
        made = with_pictures(packed, tmp_path / name, side, anyres=name == "anyres")
        chat = load(str(made), None)
        first, second = converse(chat, 1, turns=2, tokens=4)
        assert second["computed"] == second["new"] < 60
        counts[name] = first["prompt"]
    # Four tiles, a line of them cut to the picture's shape, and the whole, of 64 positions each.
    assert counts["anyres"] - counts["small"] > 3 * 64
