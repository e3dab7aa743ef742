"""AWQ and GPTQ weights: their settings in config.json, and repacking for the kernels.

Knows these formats and the packed layout of the kernels; knows no model and opens no file.

              AWQ, version gemm           GPTQ
    qweight   int32 [in, out / 8]         int32 [in / 8, out]
    qzeros    int32 [groups, out / 8]     int32 [groups, out / 8], in version 1 one too small
    scales    float16 [groups, out]       float16 [groups, out]
    g_idx                                 int32 [in]: the group of every input

A number holds eight 4-bit values. In GPTQ they are in order, lowest bits first; in AWQ value 0 to 7
belongs to output 0, 2, 4, 6, 1, 3, 5, 7. A weight is (q - zero) * scale in both.

              AWQ as llm-awq writes it, version gemv_fast of AutoAWQ
    qweight        int16 [out / 4, in]    see `in_tiles`
    scales         float [rows, out]      groups, and rows of padding
    scaled_zeros   float [rows, out]      -zero * scale; some releases call it qzeros
"""

from dataclasses import dataclass

import torch
from torch import nn

from lapilli.config.reader import JsonObject, KeyReader
from lapilli.errors import (
    CheckpointError,
    ShapeMismatchError,
    UnsupportedModelError,
)
from lapilli.kernels.packing import CHUNK, NIBBLE_ZERO, Packed, by_block, pack4
from lapilli.quant import QuantConfig
from lapilli.shapes import Int, Tensor, UInt8

NAMES = {"awq": "AWQ", "gptq": "GPTQ"}
PER_NUMBER = 8
WIDEST = 128  # inputs under one scale that the kernels know
PIECES = ("qweight", "qzeros", "scales", "scaled_zeros")
TILE = 64  # inputs of a tile of llm-awq
ADVICE = "take the checkpoint before quantization and load it with quantize='int4'"
_COLUMNS = 1024  # outputs repacked at once, which bounds the memory of a large layer


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedFormat:
    """Settings in the `quantization_config` of an AWQ or GPTQ checkpoint.

    Attributes:
        method: "awq" or "gptq".
        group_size: inputs that share a scale; -1: all of them.
        symmetric: zero is always 8.
        one_less: the files hold zero - 1.
        act_order: inputs belong to groups in any order, given by g_idx.
        is_tiled: AWQ in the layout of llm-awq.
    """

    method: str
    group_size: int = 128
    symmetric: bool = False
    one_less: bool = False
    act_order: bool = False
    is_tiled: bool = False

    @property
    def config(self) -> QuantConfig:
        """The settings of the kernels; a wide group becomes several with the same scale."""
        width = WIDEST if self.group_size < 0 else min(self.group_size, WIDEST)
        levels = "symmetric" if self.symmetric else "zeros"
        return QuantConfig(bits=4, group_size=width, levels=levels, head_bits=None)

    def inputs_of_group(self, in_features: int) -> int:
        """Return the number of inputs that share a scale in the files of a layer."""
        return in_features if self.group_size < 0 else self.group_size

    def num_groups(self, in_features: int) -> int:
        """Return the number of groups of inputs of a layer."""
        return -(-in_features // self.inputs_of_group(in_features))

    def rows_of_scales(self, in_features: int) -> int:
        """Return the number of rows of scales in the files of a layer.

        Source: llm-awq pads them to multiples of eight groups, of 16 or 32 where groups are small.
        """
        groups = self.num_groups(in_features)
        if not self.is_tiled:
            return groups
        step = PER_NUMBER * max(1, WIDEST // self.group_size)
        return -(-groups // step) * step

    def __str__(self) -> str:
        groups = f"groups of {self.group_size}" if self.group_size > 0 else "one group per output"
        zeros = "symmetric" if self.symmetric else "zero points"
        return f"{NAMES[self.method]}, 4 bits, {groups}, {zeros}"


def published_format(found: JsonObject) -> PublishedFormat:
    """Parse a `quantization_config` of method awq or gptq.

    Raises:
        UnsupportedModelError: a variant that is not read.
        ConfigError: a value of the wrong type.

    Source: transformers' AwqConfig and GPTQConfig; quant_config.json of AutoAWQ.
    """
    reader = KeyReader(found, "config.json", prefix="quantization_config.")
    method = str(found["quant_method"])
    bits = reader.integer("bits", reader.optional_integer("w_bit"))
    if bits != 4:
        raise UnsupportedModelError(
            f"config.json: {NAMES[method]} weights in {bits} bits cannot be read, only 4: {ADVICE}"
        )
    size = reader.integer("group_size", reader.integer("q_group_size", WIDEST))
    if size != -1 and size not in (32, 64) and (size < 1 or size % WIDEST):
        raise UnsupportedModelError(
            f"config.json: {NAMES[method]} groups of {size} cannot be read, only of 32, 64, "
            f"multiples of {WIDEST}, and -1: {ADVICE}"
        )
    if method == "awq":
        is_tiled = reader.text("backend") == "llm-awq"  # which calls its version gemv
        if not is_tiled:
            known = ("gemm", "gemv_fast", "llm-awq")
            is_tiled = _check_variant(reader, "version", "format", known=known) != "gemm"
        if is_tiled and size < 0:
            raise UnsupportedModelError(
                "config.json: AWQ in llm-awq's layout has groups of 32, 64 or multiples of "
                f"{WIDEST}, found {size}: {ADVICE}"
            )
        return PublishedFormat(method="awq", group_size=size, is_tiled=is_tiled)
    variant = _check_variant(reader, "checkpoint_format", "format", known=("gptq", "gptq_v2"))
    if reader.flag("is_marlin_format", False):
        raise UnsupportedModelError(f"config.json: GPTQ in marlin's format is not read: {ADVICE}")
    return PublishedFormat(
        method="gptq",
        group_size=size,
        symmetric=reader.flag("sym", True),
        one_less=variant != "gptq_v2",
        act_order=reader.flag("desc_act", False),
    )


def _check_variant(reader: KeyReader, *keys: str, known: tuple[str, ...]) -> str:
    """Return the value of the first key that is set, in lower case; the default is known[0]."""
    for key in keys:
        value = reader.text(key)
        if value is None:
            continue
        if value.lower() not in known:
            raise UnsupportedModelError(
                f"config.json: {NAMES[str(reader.raw['quant_method'])]} of {key} {value!r} cannot "
                f"be read, only {' and '.join(known)}: {ADVICE}"
            )
        return value.lower()
    return known[0]


class PublishedLinear(nn.Module):
    """Placeholder of a linear layer until its tensors are read, on the meta device.

    Raises:
        ShapeMismatchError: the format cannot hold a layer of this size.
    """

    def __init__(
        self,
        path: str,
        linear: nn.Linear,
        form: PublishedFormat,
        *,
        has_order: bool = False,
        has_bias: bool = False,
        zeros: str = "qzeros",
    ) -> None:
        super().__init__()
        self.path = path
        self.form = form
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.is_biased = linear.bias is not None
        self._zeros_name = zeros
        self._found: dict[str, Tensor] = {}
        along = "inputs" if form.method == "gptq" else "outputs"
        for name, size in (("outputs", self.out_features), ("inputs", self.in_features)):
            if name in ("outputs", along) and size % PER_NUMBER:
                raise ShapeMismatchError(
                    f"{path} has {size} {name}, but {NAMES[form.method]} packs {PER_NUMBER} into "
                    "one number: config.json and weights do not belong together"
                )
        whole = max(TILE, form.group_size)
        if form.is_tiled and self.in_features % whole:
            raise ShapeMismatchError(
                f"{path} has {self.in_features} inputs, but llm-awq packs them in tiles of {TILE} "
                f"and groups of {form.group_size}: config.json and weights do not belong together"
            )
        for name, shape, dtype in self._shapes(has_order=has_order):
            self.register_buffer(name, torch.empty(shape, dtype=dtype, device="meta"))
        if self.is_biased or has_bias:
            self.register_buffer("bias", torch.empty(self.out_features, device="meta"))

    def _shapes(self, *, has_order: bool) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
        inputs, outputs, form = self.in_features, self.out_features, self.form
        groups = form.rows_of_scales(inputs)
        if form.is_tiled:
            rows = (groups, outputs)
            return [
                ("qweight", (outputs // 4, inputs), torch.int16),
                (self._zeros_name, rows, torch.float16),
                ("scales", rows, torch.float16),
            ]
        packed = (inputs, outputs // PER_NUMBER)
        if form.method == "gptq":
            packed = (inputs // PER_NUMBER, outputs)
        shapes: list[tuple[str, tuple[int, ...], torch.dtype]] = [
            ("qweight", packed, torch.int32),
            ("qzeros", (groups, outputs // PER_NUMBER), torch.int32),
            ("scales", (groups, outputs), torch.float16),
        ]
        if has_order or form.act_order:
            shapes.append(("g_idx", (inputs,), torch.int32))
        return shapes

    def add(self, name: str, tensor: Tensor) -> Packed | None:
        """Add one tensor; return the packed layer once all of them are there.

        Raises:
            CheckpointError: a tensor of the wrong dtype, or values that the kernels cannot hold.
        """
        expected = self.get_buffer(name).dtype
        if tensor.dtype != expected and not (
            expected.is_floating_point and tensor.is_floating_point()
        ):
            raise CheckpointError(
                f"{self.path}.{name} is {tensor.dtype}, expected {expected}: "
                f"is this a file of {NAMES[self.form.method]}?"
            )
        self._found[name] = tensor
        needed = [kind for kind in (*PIECES, "g_idx") if hasattr(self, kind)]
        return self._packed() if all(kind in self._found for kind in needed) else None

    def check_bias(self, bias: Tensor) -> None:
        """Check that a bias is zero: GPTQ files have zero biases where a model has none.

        Raises:
            CheckpointError: it is not zero.
        """
        if bool(bias.any()):
            raise CheckpointError(
                f"{self.path}.bias is not zero, but the model has no bias there: config.json and "
                "weights do not belong together"
            )

    def _packed(self) -> Packed:
        inputs, form = self.in_features, self.form
        self._check_order(self._found.get("g_idx"))
        width = form.config.group_size
        starts = torch.arange(0, -(-inputs // CHUNK) * CHUNK, width)
        groups = form.num_groups(inputs)
        group = (starts // form.inputs_of_group(inputs)).clamp(max=groups - 1)
        scales = self._found["scales"][:groups].half()
        if not bool(torch.isfinite(scales).all()):
            raise CheckpointError(f"{self.path}.scales do not fit into float16")
        zeros = self._zeros()
        qweight = self._found["qweight"]
        data = []
        for start in range(0, self.out_features, _COLUMNS):
            if form.is_tiled:
                nibbles = in_tiles(qweight[start // 4 : (start + _COLUMNS) // 4])
            elif form.method == "gptq":
                nibbles = in_order(qweight[:, start : start + _COLUMNS].t())
            else:
                columns = slice(start // PER_NUMBER, (start + _COLUMNS) // PER_NUMBER)
                nibbles = interleaved(qweight[:, columns])
            data.append(pack4(nibbles))
        return Packed(
            torch.cat(data),
            by_block(scales.index_select(0, group).t()),
            None if zeros is None else by_block(zeros.index_select(0, group).t()),
            None,
            self.out_features,
            inputs,
            width,
            4,
        )

    def _check_order(self, order: Tensor | None) -> None:
        if order is None:
            return
        trivial = torch.arange(self.in_features) // self.form.inputs_of_group(self.in_features)
        if not torch.equal(order.long(), trivial):
            raise UnsupportedModelError(
                f"{self.path}.g_idx spreads the inputs over the groups (desc_act, also called "
                "act-order): such GPTQ weights are not read; take a revision without it, or "
                f"{ADVICE}"
            )

    def _zeros(self) -> UInt8[Tensor, "groups out"] | None:
        """Return the stored zero points, or None where the format says that all are 8."""
        stored = self._found[self._zeros_name]
        if self.form.is_tiled:
            return self._unscaled_zeros(stored)
        if self.form.method == "awq":
            return interleaved(stored).t()
        zeros = in_order(stored)
        if not self.form.symmetric:
            # Version 1 wraps a zero of 0 to 15.
            return (zeros + 1) & 15 if self.form.one_less else zeros
        # Some writers claim version 1 and store version 2, so the zeros themselves decide.
        first = zeros[0, 0]
        if int(first) not in (NIBBLE_ZERO - 1, NIBBLE_ZERO) or bool((zeros != first).any()):
            raise CheckpointError(
                f"{self.path}.qzeros are not all {NIBBLE_ZERO - 1} or {NIBBLE_ZERO}, but "
                "config.json says sym: correct it to false if the weights have zero points"
            )
        return None

    def _unscaled_zeros(self, stored: Tensor) -> UInt8[Tensor, "groups out"]:
        """Return the zero points of zeros that are multiplied by their negative scales.

        Raises:
            CheckpointError: they are no whole numbers from 0 to 15.
        """
        groups = self.form.num_groups(self.in_features)
        every = self._found["scales"].float()
        scales, padding = every[:groups], every[groups:]
        if not bool(scales.any(dim=1).all()) or bool(padding.any()):
            count = int(every.any(dim=1).sum())
            raise CheckpointError(
                f"{self.path}.scales has {count} groups, expected {groups} of "
                f"{self.form.group_size} inputs: is group_size in config.json the one of the files?"
            )
        exact = -stored[:groups].float() / torch.where(scales == 0, 1.0, scales)
        zeros = exact.round()
        # Both are rounded to 16 bits, bfloat16 to 8 of them: 15 is known to within 0.12.
        if not bool(((exact - zeros).abs() < 0.25).all() and ((zeros >= 0) & (zeros < 16)).all()):
            raise CheckpointError(
                f"{self.path}.{self._zeros_name} are no whole numbers from 0 to 15 times the "
                "scales: is this a file of llm-awq?"
            )
        return zeros.to(torch.uint8)


def _contiguous(numbers: Tensor) -> Tensor:
    """Return a contiguous copy, needed by a view as bytes, of a single column too."""
    return numbers.clone(memory_format=torch.contiguous_format)


def in_order(numbers: Int[Tensor, "rows columns"]) -> UInt8[Tensor, "rows nibbles"]:
    """Unpack the nibbles of every row in GPTQ's order, one after another."""
    each = _contiguous(numbers).view(torch.uint8)
    return torch.stack((each & 15, each >> 4), dim=-1).flatten(1)


def interleaved(numbers: Int[Tensor, "rows columns"]) -> UInt8[Tensor, "nibbles rows"]:
    """Unpack the nibbles of every row in AWQ's order, transposed: outputs come first.

    Half h of byte 2 a + b belongs to output 4 b + 2 h + a of eight. Numbers are transposed before
    bytes and bytes before halves, which is six times as fast as the other way round.
    """
    rows, columns = numbers.shape
    each = _contiguous(numbers.t()).view(torch.uint8).view(columns, rows, 2, 2)  # [.., a, b]
    each = each.permute(0, 3, 2, 1).contiguous()  # [columns, b, a, rows]
    return torch.stack((each & 15, each >> 4), dim=2).view(columns * PER_NUMBER, rows)


def interleave(nibbles: UInt8[Tensor, "out rows"]) -> Int[Tensor, "rows columns"]:
    """Pack nibbles as AutoAWQ does, eight outputs in a number: the inverse of `interleaved`."""
    outputs, rows = nibbles.shape
    each = nibbles.reshape(outputs // PER_NUMBER, 2, 2, 2, rows)  # [column, b, h, a, row]
    pairs = each[:, :, 0] | (each[:, :, 1] << 4)  # [column, b, a, row]
    return pairs.permute(3, 0, 2, 1).reshape(rows, -1).contiguous().view(torch.int32)


def in_tiles(numbers: Int[Tensor, "quarters inputs"]) -> UInt8[Tensor, "rows inputs"]:
    """Unpack the nibbles of llm-awq: four rows and 64 inputs are a tile.

    Number c of quarter Q of the rows holds, with c = 64 T + 16 r + 8 h + i, of row 4 Q + r the
    inputs 64 T + 32 h + 8 t + i as its nibbles t = 0 to 3, lowest bits first.
    """
    quarters, inputs = numbers.shape
    each = numbers.to(torch.int32).view(quarters, inputs // TILE, 4, 2, 1, 8)
    shifts = torch.arange(0, 16, 4, dtype=torch.int32).view(4, 1)
    nibbles = ((each >> shifts) & 15).to(torch.uint8)  # [Q, T, r, h, t, i]
    return nibbles.permute(0, 2, 1, 3, 4, 5).reshape(4 * quarters, inputs)


def tile(nibbles: UInt8[Tensor, "rows in"]) -> Int[Tensor, "quarters in"]:
    """Pack nibbles as llm-awq does, four inputs in a number: the inverse of `in_tiles`."""
    rows, inputs = nibbles.shape
    each = nibbles.reshape(rows // 4, 4, inputs // TILE, 2, 4, 8)  # [Q, r, T, h, t, i]
    low, high = (each[..., t, :] | (each[..., t + 1, :] << 4) for t in (0, 2))
    words = torch.stack((low, high), dim=-1).transpose(1, 2)  # [Q, T, r, h, i, byte]
    return words.reshape(rows // 4, 2 * inputs).view(torch.int16)


def is_published(path: str, names: frozenset[str]) -> bool:
    """Return whether the files hold any packed tensor of this layer."""
    return any(f"{path}.{piece}" in names for piece in PIECES)
