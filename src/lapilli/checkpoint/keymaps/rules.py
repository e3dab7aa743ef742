"""How a table of prefixes renames tensors, in both directions."""

import re
from dataclasses import dataclass

# Entries of published files that no parameter takes, whatever their prefix: old buffers, the text
# half of two-tower files, SigLIP's pooling head.
DROPPED = re.compile(
    r"\.rotary_emb\.inv_freq$"
    r"|(^|\.)embeddings\.position_ids$"
    r"|\.masked_bias$"
    r"|(^|\.)vision_model\.head\."
    r"|^vision_tower\.head\.|\.vision_tower\.head\."
    r"|^head\.(attention|layernorm|mlp|probe)"
    r"|^text_model\."
    r"|^(visual|text)_projection\."
    r"|^logit_(scale|bias)$"
)


@dataclass(frozen=True, slots=True)
class KeyMap:
    """Prefixes in the file and what they are called here, first match first.

    Args:
        name: in reports.
        rules: (prefix in the file, prefix here); None here: dropped on purpose.
        dropped: pattern of names that are dropped on purpose before the rules are read.
    """

    name: str
    rules: tuple[tuple[str, str | None], ...]
    dropped: re.Pattern[str] = DROPPED

    def is_dropped(self, foreign: str) -> bool:
        """Whether a tensor of the file is knowingly not loaded."""
        if self.dropped.search(foreign):
            return True
        return any(foreign.startswith(old) and new is None for old, new in self.rules)

    def to_ours(self, foreign: str) -> str | None:
        """The parameter for a tensor of the file; None when no rule knows the name."""
        for old, new in self.rules:
            if foreign.startswith(old) and new is not None:
                return new + foreign[len(old) :]
        return None

    def to_foreign(self, ours: str) -> str | None:
        """The tensor of the file for a parameter, by the first rule that fits; None without one."""
        for old, new in self.rules:
            if new is not None and ours.startswith(new):
                return old + ours[len(new) :]
        return None

    def spellings(self, ours: str) -> tuple[str, ...]:
        """Every name that a parameter or module has in files of this layout."""
        return tuple(
            old + ours[len(new) :]
            for old, new in self.rules
            if new is not None and ours.startswith(new)
        )
