"""What a person may set about an engine; knows no torch."""

from dataclasses import dataclass

from lapilli.config.generation import check_count
from lapilli.errors import GenerationError

MIB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """Limits of an engine.

    Args:
        max_rows: most sequences that are worked on at the same time.
        max_waiting: most requests that wait for their turn; `submit` refuses more.
        chunk: most new prompt positions per step while other answers grow, so that a long prompt
            delays their next token by the time of so many positions only.
        max_step: most prompt positions per step while no answer grows; one prompt of up to
            four times as many is read at once.
        block_size: positions per block of keys and values.
        kv_bytes: memory for keys and values, cached ones included; on a CPU it is taken as it is
            used. None: a quarter of the machine's or the GPU's memory, no less than one whole
            context and no more than `max_rows` of them.
        kv_dtype: how keys and values are kept: "model": as they are computed; "bfloat16": half of
            float32; "int8": about a quarter, see QuantizedBlockStore for what it costs; "auto":
            bfloat16 for a packed model on a CPU, else as they are computed.
        prefix_bytes: of these, what may be kept of sequences that are over; 0 switches the prefix
            cache off. None: all of `kv_bytes`, or an eighth of the memory where that is None too.
        feature_bytes: most bytes of features of pictures that are kept; 0 keeps none.
        speculate: whether guesses of the next tokens are checked: "off"; "auto", those that make
            tokens come faster by the clock; "on", those that would if each took a tenth of a pass.
        compile: how a step runs in which every row gives one token. "on": in fixed shapes and
            translated by torch.compile, on CUDA recorded as graphs; "static": the same without
            the compiler; "off": as every other step; "auto": on CUDA the first of these that
            works, else "off".

    Raises:
        GenerationError: a number below its least, or an unknown word.
    """

    max_rows: int = 16
    max_waiting: int = 1024
    chunk: int = 128
    max_step: int = 1024
    block_size: int = 32
    kv_bytes: int | None = None
    kv_dtype: str = "auto"
    prefix_bytes: int | None = None
    feature_bytes: int = 256 * MIB
    speculate: str = "auto"
    compile: str = "auto"

    def __post_init__(self) -> None:
        for name in ("max_rows", "max_waiting", "chunk", "max_step", "block_size"):
            check_count(name, getattr(self, name), least=1)
        for name in ("kv_bytes", "prefix_bytes", "feature_bytes"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name), least=0)
        if self.kv_dtype not in ("auto", "model", "bfloat16", "int8"):
            raise GenerationError(
                f"kv_dtype must be 'auto', 'model', 'bfloat16' or 'int8', got {self.kv_dtype!r}"
            )
        if self.speculate not in ("on", "off", "auto"):
            raise GenerationError(
                f"speculate must be 'on', 'off' or 'auto', got {self.speculate!r}"
            )
        if self.compile not in ("auto", "on", "static", "off"):
            raise GenerationError(
                f"compile must be 'auto', 'on', 'static' or 'off', got {self.compile!r}"
            )
