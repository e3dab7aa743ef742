"""How long the vision tower and the projector look at pictures in every number format; how well.

    .venv/bin/python -m benchmarks.tower --tiles 1,5

CLIP-L/14-336 with gaussian weights, as in checkpoint.py: one tile is a picture, five are one of
anyres. Every format runs module by module and in one call a layer (kernels/tower.py), in turns;
medians count. `share` is of the fastest format's peak, measured in the same run (limits.py);
`apart` and `cosine` compare the features of every patch with those in float32. With one thread the
clock is the thread's own CPU time, so that a neighbour on the machine costs cache and memory
bandwidth but no waiting. Results of runs with other threads or tiles are kept. Writes
benchmarks/results/tower.json.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from benchmarks.checkpoint import CLIP_L, CLIP_TINY
from benchmarks.limits import measure_limits
from benchmarks.machine import RESULTS, machine
from lapilli.config.model import ImageConfig, PixelConfig, ProjectorConfig, VisionConfig
from lapilli.geometry import ImageSize
from lapilli.kernels.library import native
from lapilli.modality.image.image import ImageModality, VisionLayer
from lapilli.nn.attention import attend_all
from lapilli.nn.linear import FloatLinear, has_onednn
from lapilli.plan.flops import projector_operations, tower_operations
from lapilli.quant.linear import QuantLinear
from lapilli.quant.quantize import round8

FORMATS = ("float32", "bfloat16", "int8 g32", "int8 g128")
"""Of weights and rows; groups of inputs share a scale."""
SIDE = 336


def configs(shape: str) -> tuple[VisionConfig, ProjectorConfig]:
    facts = CLIP_TINY if shape == "tiny" else CLIP_L
    vision = VisionConfig(
        image_size=SIDE,
        patch_size=14,
        hidden_size=facts["hidden_size"],
        intermediate_size=facts["intermediate_size"],
        num_layers=facts["num_hidden_layers"],
        num_heads=facts["num_attention_heads"],
    )
    width = 256 if shape == "tiny" else 2048
    sizes = {"vision_size": vision.hidden_size, "hidden_size": width}
    return vision, ProjectorConfig(kind="mlp", depth=2, **sizes)


def build(shape: str, name: str) -> ImageModality:
    """The tower and the projector in a number format; the same weights in all of them."""
    vision, projector = configs(shape)
    pixels = PixelConfig(crop_size=ImageSize(SIDE, SIDE), shortest_edge=SIDE)
    image = ImageConfig(pixels=pixels, aspect="square", merge="flat")
    model = ImageModality(image, vision, projector)
    random = torch.Generator().manual_seed(0)
    for path, weight in model.named_parameters():
        is_norm = "norm" in path and path.endswith("weight")
        weight.data = torch.randn(weight.shape, generator=random) * 0.02 + float(is_norm)
    if name == "bfloat16":
        model.bfloat16()
    for path, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear):
            continue
        if name.startswith("int8"):
            group = int(name.rpartition("g")[2])
            layer: nn.Module = QuantLinear(round8(module.weight, module.bias, group))
        else:
            layer = FloatLinear.of(module, by_onednn=name == "float32" and has_onednn())
        model.set_submodule(path, layer)
    return model.eval().requires_grad_(False)


def layers_of(model: ImageModality) -> list[VisionLayer]:
    used = model.vision_tower.num_used_layers
    return list(model.vision_tower.vision_model.encoder.layers)[:used]


def set_way(model: ImageModality, *, one_call: bool) -> None:
    """Let the layers run in one call, or module by module."""
    for layer in layers_of(model):
        layer.fused.takes_floats = one_call
        if one_call:
            layer.__dict__.pop("forward", None)
        else:
            layer.__dict__["forward"] = layer.by_modules


def clock_of_run() -> Callable[[], float]:
    return time.thread_time if torch.get_num_threads() == 1 else time.perf_counter


def seconds_of(call: Callable[[], object]) -> float:
    clock = clock_of_run()
    started = clock()
    call()
    return clock() - started


def median_ms(call: Callable[[], object], repeats: int) -> float:
    call()
    return 1e3 * statistics.median(seconds_of(call) for _ in range(repeats))


def apart(found: torch.Tensor, truth: torch.Tensor) -> dict[str, float]:
    """How far features are from those in float32, vector by vector."""
    found, truth = found.float(), truth.float()
    error = (found - truth).norm(dim=-1) / truth.norm(dim=-1)
    cosine = torch.cosine_similarity(found, truth, dim=-1)
    return {
        "apart_mean": error.mean().item(),
        "apart_worst": error.max().item(),
        "cosine_mean": cosine.mean().item(),
        "cosine_worst": cosine.min().item(),
    }


def parts_ms(model: ImageModality, repeats: int) -> dict[str, float]:
    """Milliseconds of the parts of a pass over one tile, module by module, all layers together."""
    tower, layers = model.vision_tower.vision_model, layers_of(model)
    layer, count = layers[0], len(layers)
    attention, mlp = layer.self_attn, layer.mlp
    dtype = tower.embeddings.patch_embedding.weight.dtype
    config = model.vision
    pixels = torch.randn(1, 3, SIDE, SIDE)
    x = torch.randn(1, config.num_patches + 1, config.hidden_size).to(dtype)
    inner = torch.randn(1, x.shape[1], config.intermediate_size).to(dtype)
    q = x.unflatten(-1, (config.num_heads, -1)).transpose(1, 2)
    three = (attention.q_proj, attention.k_proj, attention.v_proj)
    parts: dict[str, tuple[int, Callable[[], object]]] = {
        "patch embedding": (1, lambda: tower.embeddings(pixels)),
        "norms": (2 * count, lambda: layer.layer_norm1(x)),
        "q, k, v": (count, lambda: [project(x) for project in three]),
        "attention": (count, lambda: attend_all(q, q, q)),
        "out": (count, lambda: attention.out_proj(x)),
        "fc1": (count, lambda: mlp.fc1(x)),
        "activation": (count, lambda: mlp.act(inner)),
        "fc2": (count, lambda: mlp.fc2(inner)),
        "residuals": (2 * count, lambda: x + x),
        "projector": (1, lambda: model.projector(x[:, 1:])),
    }
    found = {name: times * median_ms(call, repeats) for name, (times, call) in parts.items()}
    set_way(model, one_call=True)
    found["layers, one call"] = count * median_ms(lambda: layer(x), repeats)
    return found


def prepare_ms(model: ImageModality, repeats: int) -> float:
    """Milliseconds to make a tile of a photograph."""
    photograph = Image.effect_noise((1024, 768), 80).convert("RGB")
    return median_ms(lambda: model.prepare(photograph), repeats)


@torch.inference_mode()
def measure(
    shape: str, tiles: int, formats: tuple[str, ...], repeats: int
) -> dict[str, dict[str, float]]:
    """Seconds, operations a second and features of every format and way, by "format, way"."""
    vision, projector = configs(shape)
    work = tiles * (tower_operations(vision) + projector_operations(vision, projector))
    pixels = torch.randn(tiles, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    truth = None
    found: dict[str, dict[str, float]] = {}
    for name in formats:
        model = build(shape, name)
        times: dict[bool, list[float]] = {False: [], True: []}
        features: dict[bool, torch.Tensor] = {}
        for turn in range(repeats + 1):
            for one_call in times:
                set_way(model, one_call=one_call)
                if turn == 0:  # the call is compared with the modules, and everything warms up
                    features[one_call] = model.encode_tiles(pixels)
                else:
                    times[one_call].append(seconds_of(partial(model.encode_tiles, pixels)))
        if truth is None:
            truth = (
                features[False]
                if name == "float32"
                else build(shape, "float32").encode_tiles(pixels)
            )
        for one_call, way in ((False, "modules"), (True, "one call")):
            seconds = statistics.median(times[one_call])
            row = {"seconds": seconds, "per_s": work / seconds}
            found[f"{name}, {way}"] = row | apart(features[one_call], truth)
        print(describe(name, found), flush=True)
    return found


def describe(name: str, found: dict[str, dict[str, float]]) -> str:
    words = []
    for way in ("modules", "one call"):
        row = found[f"{name}, {way}"]
        words.append(f"{way} {1e3 * row['seconds']:.0f} ms, {row['per_s'] / 1e9:.0f} GFLOP/s")
    row = found[f"{name}, one call"]
    errors = f"apart {row['apart_mean']:.4f}, cosine {row['cosine_worst']:.5f} at worst"
    return f"{name:<10} {'; '.join(words)}; {errors}"


def share_out(found: dict[str, dict[str, float]], limits: dict[str, float]) -> None:
    """Add the shares of the fastest format's peak, and of the format's own."""
    peaks = {name: limits[f"{name}_per_s"] for name in ("float32", "bfloat16", "int8")}
    for name, row in found.items():
        row["share"] = row["per_s"] / max(peaks.values())
        row["share_of_own"] = row["per_s"] / peaks[name.partition(",")[0].partition(" ")[0]]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="S", choices=("tiny", "S"))
    parser.add_argument("--tiles", default="1,5", help="of a pass")
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--parts", action="store_true", help="what the parts of a pass take, too")
    parser.add_argument("--out", type=Path, default=RESULTS / "tower.json")
    wanted = parser.parse_args(arguments)
    torch.set_num_threads(wanted.threads)
    library = native()
    facts = machine() | {"kernels": None if library is None else library.isa}
    known: dict[str, Any] = json.loads(wanted.out.read_text()) if wanted.out.exists() else {}
    report: dict[str, Any] = known.setdefault(f"{wanted.threads} threads", {})
    formats = tuple(wanted.formats.split(","))
    limits = measure_limits(clock=clock_of_run())
    report |= {"shape": wanted.shape, "limits": limits, "machine": facts}
    for tiles in map(int, wanted.tiles.split(",")):
        found = measure(wanted.shape, tiles, formats, wanted.repeats)
        report.setdefault(f"{tiles} tiles", {}).update(found)
        for name, rows in report.items():
            if name.endswith(" tiles"):
                share_out(rows, limits)
        wanted.out.write_text(json.dumps(known, indent=2) + "\n")
    if wanted.parts:
        with torch.inference_mode():
            models = {name: build(wanted.shape, name) for name in formats}
            parts = {name: parts_ms(model, wanted.repeats) for name, model in models.items()}
            report["parts_ms"] = parts
            report["prepare_ms"] = prepare_ms(models[formats[0]], wanted.repeats)
    wanted.out.write_text(json.dumps(known, indent=2) + "\n")


if __name__ == "__main__":
    main()
