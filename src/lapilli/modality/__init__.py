"""Protocol of a modality: something that can stand where tokens stand.

raw --prepare()--> Prepared --num_tokens()--> span in the prompt
                      '--embed([...])-------> features [n, D], n as promised
"""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from lapilli.shapes import Float, Tensor


@runtime_checkable
class Modality(Protocol):
    """A kind of media that can stand where tokens stand.

    What `prepare` returns is the modality's own; it only travels from there to `num_tokens` and
    `embed`.
    """

    @property
    def name(self) -> str:
        """Return the name that spans and messages carry, for instance "image"."""
        ...

    def prepare(self, raw: Any) -> Any:  # noqa: ANN401 - every modality has its own raw form
        """Return the numbers of one item, on the CPU, without parameters."""
        ...

    def num_tokens(self, prepared: Any) -> int:  # noqa: ANN401
        """Return the positions that the item takes in the prompt, from sizes alone."""
        ...

    def embed(self, items: Sequence[Any]) -> list[Float[Tensor, "_ D"]]:
        """Return the features of every item, as many as `num_tokens` says, whatever the others."""
        ...
