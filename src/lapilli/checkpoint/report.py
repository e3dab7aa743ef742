"""What became of every tensor and every configuration key of a checkpoint."""

from dataclasses import dataclass, field

from lapilli.config.reader import KeyReport, shown


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """Counted and named; loading succeeds only with nothing missing and nothing unexpected.

    Args:
        used: parameters, by the names they have in lapilli.
        dropped: tensors of the files that are not loaded on purpose.
        missing: parameters without a tensor.
        unexpected: tensors of the files that no parameter takes.
        notes: what a person should know, one sentence each.
        keys: what became of the configuration keys.
    """

    used: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    keys: KeyReport = field(default_factory=KeyReport)


def some(names: tuple[str, ...] | list[str], most: int = 3) -> str:
    """The first names and how many more there are."""
    first = ", ".join(shown(name)[1:-1] for name in names[:most])
    return first if len(names) <= most else f"{first} and {len(names) - most} more"
