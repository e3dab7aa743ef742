"""The linear kernels beside torch's, one layer at a time, interleaved in one run.

    .venv/bin/python -m benchmarks.kernels --shape 4096x4096 --rows 1,8,128 --threads 1

GB/s counts the bytes of the weight as it is stored, GOP/s two operations per multiply-add. With one
thread the clock is the thread's own CPU time, so a neighbour on the machine costs cache and memory
bandwidth but no waiting. `cold` layers rotate through more weights than the caches hold.
"""

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional

from lapilli.kernels.library import native, open_library
from lapilli.kernels.linear import linear_native, native_weights
from lapilli.kernels.packing import Packed

Call = Callable[[torch.Tensor], torch.Tensor]
COLD_BYTES = 256 << 20


def random_packed(bits: int, shape: tuple[int, int], group: int = 128) -> Packed:
    """Random integers in the packed layout: rounding a weight first would take longer."""
    out_features, in_features = shape
    blocks = out_features // 16
    data = torch.randint(1, 255, (blocks, in_features * bits // 32, 64), dtype=torch.uint8)
    scales = torch.rand(blocks, in_features // group, 16).half() * 0.01
    if bits == 8:
        scales = torch.rand(blocks, 16) * 0.01
    return Packed(data, scales, None, None, out_features, in_features, group, bits)


def layers(shape: tuple[int, int]) -> dict[str, tuple[Callable[[], Call], float]]:
    """How to make a layer of each kind, and its bytes."""
    size = shape[0] * shape[1]

    def packed(bits: int, group: int = 128, *, weight_only: bool = False) -> Call:
        weight = random_packed(bits, shape, group)
        described = native_weights(weight)
        library = native()
        if library is None:
            raise SystemExit("nothing was compiled")

        def call(x: torch.Tensor, _kept: Packed = weight) -> torch.Tensor:
            """The weight lives as long as the function that was made of it."""
            return linear_native(library, x, [described], weight_only=weight_only)[0]

        return call

    def plain(dtype: torch.dtype) -> Call:
        weight = torch.randn(shape).to(dtype)
        return lambda x: functional.linear(x.to(dtype), weight)

    def fbgemm() -> Call:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            linear = torch.nn.Sequential(torch.nn.Linear(shape[1], shape[0], bias=False))
            return torch.ao.quantization.quantize_dynamic(linear, {torch.nn.Linear}, torch.qint8)

    return {
        "torch float32": (lambda: plain(torch.float32), 4.0 * size),
        "torch bfloat16": (lambda: plain(torch.bfloat16), 2.0 * size),
        "torch fbgemm dynamic int8": (fbgemm, 1.0 * size),
        "int8": (lambda: packed(8), 1.0 * size),
        "int4 g128": (lambda: packed(4), size * (0.5 + 2 / 128)),
        "int4 g32": (lambda: packed(4, 32), size * (0.5 + 2 / 32)),
        "int4 g128 weight only": (lambda: packed(4, weight_only=True), size * (0.5 + 2 / 128)),
    }


def measure(shape: tuple[int, int], rows: list[int], *, repeats: int, cold: bool) -> list[dict]:
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    made: dict[str, list[Call]] = {}
    for name, (make, num_bytes) in layers(shape).items():
        made[name] = [make() for _ in range(1 + int(COLD_BYTES // num_bytes) if cold else 1)]
    found = []
    for count in rows:
        x = torch.randn(count, shape[1])
        times: dict[str, list[float]] = {name: [] for name in made}
        for turn in range(repeats):
            for name, calls in made.items():
                call = calls[turn % len(calls)]
                started = clock()
                call(x)
                times[name].append(clock() - started)
        for name, seconds in times.items():
            median = statistics.median(seconds)
            num_bytes = layers(shape)[name][1]
            operations = 2.0 * count * shape[0] * shape[1]
            found.append(
                {
                    "layer": name,
                    "rows": count,
                    "ms": 1e3 * median,
                    "least_ms": 1e3 * min(seconds),
                    "gb_per_s": num_bytes / median / 1e9,
                    "gop_per_s": operations / median / 1e9,
                }
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="4096x4096")
    parser.add_argument("--rows", default="1,8,128")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--isa", default="")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    open_library(options.isa)
    out_features, _, in_features = options.shape.partition("x")
    rows = [int(count) for count in options.rows.split(",")]
    with torch.inference_mode():
        found = measure(
            (int(out_features), int(in_features)), rows, repeats=options.repeats, cold=options.cold
        )
    for one in found:
        print(
            f"{one['layer']:<28} {one['rows']:>4} rows  {one['ms']:8.3f} ms (least "
            f"{one['least_ms']:.3f})  {one['gb_per_s']:6.1f} GB/s  {one['gop_per_s']:7.1f} GOP/s"
        )
    if options.out is not None:
        options.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
