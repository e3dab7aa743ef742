"""What lapilli asks of a modality; knows nothing of language models, prompts or files.

raw --prepare()--> Prepared --num_tokens()--> span in the prompt
                      '--embed([...])-------> features [n, D], n as promised
"""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from lapilli.shapes import Float, Tensor


@runtime_checkable
class Modality(Protocol):
    """One kind of thing that can stand where tokens stand.

    What `prepare` returns is the modality's own; it only travels from there to `num_tokens` and
    `embed`.
    """

    @property
    def name(self) -> str:
        """The name that spans and messages carry, for instance "image"."""
        ...

    def prepare(self, raw: Any) -> Any:  # noqa: ANN401 - every modality has its own raw form
        """Numbers of one item, on the CPU, without parameters."""
        ...

    def num_tokens(self, prepared: Any) -> int:  # noqa: ANN401
        """Positions that the item takes in the prompt, from sizes alone."""
        ...

    def embed(self, items: Sequence[Any]) -> list[Float[Tensor, "_ D"]]:
        """Features of every item, as many as `num_tokens` said, each equal to its solo run."""
        ...
