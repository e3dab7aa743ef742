import io

import torch

from lapilli.compat.text_streamer import TextStreamer, is_ideograph


class Letters:
    """Ids are code points; special ones are 0."""

    def decode(self, ids: list[int], **_: object) -> str:
        return "".join(chr(i) for i in ids if i)


def shown(text: str) -> list[str]:
    """What stands in the output after each character."""
    out = io.StringIO()
    streamer = TextStreamer(Letters(), skip_prompt=True, output=out)
    streamer.put(torch.tensor([[ord("P")]]))
    seen = []
    for character in text:
        streamer.put(torch.tensor([ord(character)]))
        seen.append(out.getvalue())
    streamer.end()
    return [*seen, out.getvalue()]


def test_a_word_appears_once_it_is_whole() -> None:
    assert shown("ab c") == ["", "", "ab ", "ab ", "ab c\n"]


def test_a_line_appears_at_once() -> None:
    assert shown("a\nb") == ["", "a\n", "a\n", "a\nb\n"]


def test_an_ideograph_appears_at_once() -> None:
    assert shown("你b") == ["你", "你", "你b\n"]
    assert is_ideograph("你")
    assert not is_ideograph("я")


def test_the_prompt_is_skipped_again_after_the_end() -> None:
    out = io.StringIO()
    streamer = TextStreamer(Letters(), skip_prompt=True, output=out)
    for _ in range(2):
        streamer.put(torch.tensor([[ord("P")]]))
        streamer.put(torch.tensor([ord("a")]))
        streamer.end()
    assert out.getvalue() == "a\na\n"


def test_without_skipping_the_prompt_is_shown() -> None:
    out = io.StringIO()
    streamer = TextStreamer(Letters(), output=out)
    streamer.put(torch.tensor([[ord("P"), ord(" ")]]))
    streamer.end()
    assert out.getvalue() == "P \n"
