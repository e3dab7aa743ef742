import pytest
from hypothesis import given
from hypothesis import strategies as st

from lapilli.generate.stop import StopStrings

texts = st.text(alphabet="ab#", max_size=12)
stops = st.lists(st.text(alphabet="ab#", min_size=1, max_size=4), min_size=1, max_size=3)


def run(pieces: list[str], stop_strings: list[str]) -> tuple[list[str], str | None]:
    strings = StopStrings(stop_strings)
    shown = [strings.push(piece) for piece in pieces]
    if strings.found is None:
        shown.append(strings.flush())
    return shown, strings.found


def test_held_back_while_forming():
    strings = StopStrings(["###", "</s>"])
    assert strings.push("one #") == "one "
    assert strings.push("#") == ""
    assert strings.push("two") == "##two"
    assert strings.push(" <") == " "
    assert strings.push("/s") == ""
    assert strings.push("> three") == ""
    assert strings.found == "</s>"
    assert strings.push("four") == ""


def test_flush_returns_what_never_became_a_stop_string():
    strings = StopStrings(["</s>"])
    assert strings.push("a </") == "a "
    assert strings.flush() == "</"
    assert strings.flush() == ""


@pytest.mark.parametrize(
    ("text", "stop_strings", "shown", "found"),
    [
        ("aab", ["ab"], "a", "ab"),  # the first a is held, then let go
        ("xaba", ["aba", "ab"], "x", "ab"),  # the one that ends first
        ("xabc", ["bc", "abc"], "x", "abc"),  # both end together: the longest
        ("abab#", ["ab#"], "ab", "ab#"),  # overlapping beginnings
        ("", ["a"], "", None),
    ],
)
def test_which_one_counts(text, stop_strings, shown, found):
    for pieces in (list(text), [text]):
        got, which = run(pieces, stop_strings)
        assert ("".join(got), which) == (shown, found)


@given(st.lists(texts, max_size=6), stops)
def test_the_cut_does_not_matter(pieces: list[str], stop_strings: list[str]):
    text = "".join(pieces)
    shown, found = run(pieces, stop_strings)
    one_by_one, same = run(list(text), stop_strings)
    assert ("".join(shown), found) == ("".join(one_by_one), same)
    if found is None:
        assert "".join(shown) == text
        assert not any(stop in text for stop in stop_strings)
    else:
        assert text.startswith("".join(shown) + found)
        assert not any(stop in "".join(shown) for stop in stop_strings)


@given(texts, stops)
def test_nothing_shown_was_part_of_the_stop_string(text: str, stop_strings: list[str]):
    shown, found = run(list(text), stop_strings)
    ends = [text.find(s) + len(s) for s in stop_strings if s in text]
    if found is None:
        assert not ends
    else:
        assert len("".join(shown)) + len(found) == min(ends)


def test_without_stop_strings_nothing_is_held():
    strings = StopStrings([])
    assert strings.push("any") == "any"
    assert strings.flush() == ""
