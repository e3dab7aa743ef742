"""An inspection as lines of text; knows plain values only."""

from collections.abc import Mapping, Sequence
from textwrap import wrap

LABEL_WIDTH = 16
LINE_WIDTH = 100
# Hundreds of tensors may be dropped (a whole text tower); the JSON form lists them all.
CUT = {"dropped": 12}


def as_text(found: Mapping[str, object]) -> str:
    """One fact after another, empty ones left out; every name is listed but those of `CUT`."""
    lines: list[str] = []
    for key, value in found.items():
        text = _value(key, value)
        if text:
            label = "bytes in files" if key == "num_bytes" else key.replace("_", " ")
            lines.append(f"{label:<{LABEL_WIDTH}} {text}")
    return "\n".join(lines)


def _value(key: str, value: object) -> str:
    if isinstance(value, Mapping):
        return _mapping(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return _list(key, [str(one) for one in value])
    return _number(value) if value else ""


def _mapping(value: Mapping[object, object]) -> str:
    known = {str(key): one for key, one in value.items() if one is not None}
    if set(known) >= {"name", "reason"}:
        rest = f"; {known['note']}" if "note" in known else ""
        return f"{known['name']} ({known['reason']}){rest}"
    return ", ".join(f"{key} {_number(one)}" for key, one in known.items())


def _list(key: str, names: list[str]) -> str:
    """Sentences stand one per line, names beside each other."""
    if not names:
        return ""
    margin = "\n" + " " * (LABEL_WIDTH + 1)
    if key in ("notes", "layers_on_cpu"):
        return margin.join(names)
    shown = names[: CUT.get(key, len(names))]
    more = f" and {len(names) - len(shown)} more" if len(shown) < len(names) else ""
    text = f"{len(names)}: {', '.join(shown)}{more}"
    return margin.join(wrap(text, LINE_WIDTH - LABEL_WIDTH, break_on_hyphens=False))


def _number(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10_000:
        return f"{value:,}"
    return str(value)
