"""Kinds of scores: the number of an item, from the last hidden state of its prompt.

    YesNo    probability of yes over {yes, no}, or the difference of their logits
    Labels   probabilities over labels, and the mean of their values as the number
    Head     a linear layer [1, D] that was trained for it

Probabilities are taken over the labels of one item, never over items.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from lapilli.config.reader import given_path, shown
from lapilli.errors import CheckpointError, ConfigError, PromptError, ShapeMismatchError
from lapilli.prompt.tokenizer import Tokenizer
from lapilli.shapes import Float, Tensor

Label = str | int
"""A text of one token, or the id of a token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class YesNo:
    """Probability of `yes` over {yes, no}; with `difference` logit(yes) - logit(no)."""

    yes: Label = "yes"
    no: Label = "no"
    difference: bool = False

    @property
    def labels(self) -> tuple[Label, ...]:
        """Return the labels whose logits are read."""
        return (self.yes, self.no)

    def numbers(self, logits: Float[Tensor, "n 2"]) -> Float[Tensor, " n"]:
        """Return one number per item."""
        difference = logits[:, 0] - logits[:, 1]
        return difference if self.difference else torch.sigmoid(difference)


@dataclass(frozen=True, slots=True)
class Labels:
    """Probabilities over labels, whose mean value is the number of an item.

    Attributes:
        labels: each of one token.
        values: what each of them is worth; None: the numbers that they are.

    Raises:
        ConfigError: fewer than two labels, labels that are no numbers without `values`, or another
            number of values.
    """

    labels: tuple[Label, ...]
    values: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.labels, str) or len(self.labels) < 2:
            raise ConfigError(f"labels must be a tuple of at least two, got {shown(self.labels)}")
        if self.values is None:
            try:
                values = tuple(float(label) for label in self.labels)
            except ValueError as error:
                raise ConfigError(
                    f"the labels {', '.join(map(str, self.labels))} are no numbers: say with "
                    "values=(...) what each of them is worth"
                ) from error
            object.__setattr__(self, "values", values)
        elif len(self.values) != len(self.labels):
            raise ConfigError(
                f"{len(self.labels)} labels but {len(self.values)} values: give one for each"
            )

    def numbers(self, logits: Float[Tensor, "n L"]) -> Float[Tensor, " n"]:
        """Return one number per item."""
        return logits.softmax(dim=-1) @ torch.tensor(self.values)


@dataclass(frozen=True, slots=True, eq=False)
class Head:
    """A linear layer over the last hidden state, behind the final norm of the model.

    Attributes:
        weight: one row.
        bias: one number, or None.
        probability: the sigmoid of what comes out instead of the logit.
    """

    weight: Float[Tensor, "1 D"]
    bias: Float[Tensor, " 1"] | None = None
    probability: bool = False

    @classmethod
    def load(cls, path: str | Path, *, probability: bool = False) -> "Head":
        """Return the head of a safetensors file: `weight` [1, D] and, if it is there, `bias` [1].

        Raises:
            CheckpointError: no such file, or one that holds something else.
        """
        file = given_path(path)
        try:
            tensors = load_file(file)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file}: the head cannot be read: {error}") from error
        if set(tensors) - {"bias"} != {"weight"}:
            names = ", ".join(sorted(tensors)) or "nothing"
            raise CheckpointError(f"{file} holds {names}: a head has weight [1, D], and maybe bias")
        return cls(tensors["weight"], tensors.get("bias"), probability)

    def check(self, width: int) -> None:
        """Refuse a head of another model.

        Raises:
            ShapeMismatchError: it does not read vectors of this width.
            CheckpointError: it has NaN or infinite numbers.
        """
        shapes = [list(self.weight.shape), None if self.bias is None else list(self.bias.shape)]
        if shapes[0] != [1, width] or shapes[1] not in (None, [1]):
            raise ShapeMismatchError(
                f"a head of this model has weight [1, {width}] and bias [1] or none, got "
                f"{shapes[0]} and {shapes[1]}"
            )
        if not all(
            bool(one.isfinite().all()) for one in (self.weight, self.bias) if one is not None
        ):
            raise CheckpointError("the head has NaN or infinite numbers: train it again")

    def logits(self, hidden: Float[Tensor, "n D"]) -> Float[Tensor, "n 1"]:
        """Return what the layer says of hidden states, in float32."""
        weight = self.weight.to(hidden.device).float()
        bias = None if self.bias is None else self.bias.to(hidden.device).float()
        return torch.nn.functional.linear(hidden.float(), weight, bias)

    def numbers(self, logits: Float[Tensor, "n 1"]) -> Float[Tensor, " n"]:
        """Return one number per item."""
        return torch.sigmoid(logits[:, 0]) if self.probability else logits[:, 0]


Score = YesNo | Labels | Head


def label_tokens(labels: Sequence[Label], tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Return tokens that all labels begin with, and the token that each of them is.

    A SentencePiece tokenizer may cut a digit into a space and the digit. A space that all labels
    begin with is the end of the prompt then, and not what tells them apart.

    Raises:
        PromptError: a label of several tokens or of none, two of the same token, or an id that the
            vocabulary does not have.
    """
    cut = [_tokens(label, tokenizer) for label in labels]
    lead: list[int] = []
    are_alike = all(len(ids) == 2 for ids in cut) and len({ids[0] for ids in cut}) == 1
    if are_alike and not tokenizer.token_bytes(cut[0][0]).strip():
        lead = cut[0][:1]
    for label, ids in zip(labels, cut, strict=True):
        if len(ids) != len(lead) + 1:
            tokens = ", ".join(repr(tokenizer.id_to_token(i)) for i in ids) or "none"
            raise PromptError(
                f"the label {label!r} has {len(ids)} tokens ({tokens}), a label has one: choose a "
                "shorter one, or give the id of a token"
            )
    found = [ids[-1] for ids in cut]
    for label, index in zip(labels, found, strict=True):
        if found.count(index) > 1:
            raise PromptError(
                f"the label {label!r} is the token {index}, which another label is too: labels "
                "must differ"
            )
    return lead, found


def _tokens(label: Label, tokenizer: Tokenizer) -> list[int]:
    if isinstance(label, str):
        return tokenizer.encode(label, add_bos=False, literal=[(0, len(label))])
    if not 0 <= label < tokenizer.vocab_size:
        raise PromptError(
            f"the label {label} is no token: the vocabulary has 0 to {tokenizer.vocab_size - 1}"
        )
    return [label]
