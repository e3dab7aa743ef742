"""Labels that an answer may begin with, as a tree of tokens, and the probabilities of its leaves.

    01 02 10 11  -->  0 -+- 1        P("02") = P(0 | 0, 1) * P(2 | 1, 2 after 0)
                         '- 2
                      1 -+- 0
                         '- 1

Where a label has several tokens, its probability is the product along its way, at every node over
the tokens that go on from there: what a model says that can write nothing but a label. Knows tokens
and logits; must not know questions.
"""

from collections.abc import Mapping, Sequence

import torch

from lapilli.errors import PromptError
from lapilli.prompt.tokenizer import Tokenizer
from lapilli.shapes import Float, Tensor

Path = tuple[int, ...]
"""Tokens from the root of the tree."""


class LabelTree:
    """The tokens that tell labels apart.

    Args:
        labels: per label the token sequences that stand for it.
        names: what errors call the labels.

    Raises:
        PromptError: a label without tokens, or one whose tokens are the beginning of another's.
    """

    def __init__(self, labels: Sequence[Sequence[Path]], names: Sequence[str]) -> None:
        self._labels = labels
        self._children: dict[Path, list[int]] = {}
        owners: dict[Path, str] = {}
        for paths, name in zip(labels, names, strict=True):
            for path in paths:
                if not path:
                    raise PromptError(f"the label {name!r} has no tokens: choose another one")
                if path in owners:
                    raise PromptError(
                        f"the labels {owners[path]!r} and {name!r} are the same tokens: labels "
                        "must differ"
                    )
                owners[path] = name
                for at, token in enumerate(path):
                    children = self._children.setdefault(path[:at], [])
                    if token not in children:
                        children.append(token)
        for path, name in owners.items():
            if path in self._children:
                raise PromptError(
                    f"the tokens of the label {name!r} are the beginning of another label: choose "
                    "labels of one length"
                )

    @property
    def lead(self) -> Path:
        """Return the tokens that all labels begin with."""
        path: Path = ()
        while len(self._children[path]) == 1 and (*path, *self._children[path]) in self._children:
            path = (*path, *self._children[path])
        return path

    @property
    def nodes(self) -> dict[Path, list[int]]:
        """Return the paths where labels part, and the tokens that go on from there."""
        return {path: ids for path, ids in self._children.items() if len(ids) > 1}

    def probabilities(self, logits: Mapping[Path, Float[Tensor, " k"]]) -> tuple[float, ...]:
        """Return the probability of every label; they add up to 1.

        Args:
            logits: of the tokens of every node.
        """
        steps: dict[Path, float] = {}
        for path, ids in self._children.items():
            shares = logits[path].double().log_softmax(dim=-1) if len(ids) > 1 else torch.zeros(1)
            steps.update({(*path, token): float(shares[at]) for at, token in enumerate(ids)})
        ways = [
            [sum(steps[path[: at + 1]] for at in range(len(path))) for path in paths]
            for paths in self._labels
        ]
        return tuple(float(torch.tensor(way, dtype=torch.float64).exp().sum()) for way in ways)


def spellings(texts: Sequence[str], tokenizer: Tokenizer) -> list[Path]:
    """Return the tokens of a label that may be written in several ways.

    The first text always, the others where they are one token.
    """
    cut = [tuple(tokenizer.encode(text, add_bos=False, literal=[(0, len(text))])) for text in texts]
    return list(dict.fromkeys([cut[0], *(path for path in cut[1:] if len(path) == 1)]))
