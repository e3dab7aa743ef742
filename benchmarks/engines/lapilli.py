"""lapilli, by the engine that `Chat` answers with."""

import torch

import lapilli
from benchmarks.engines import Options
from benchmarks.timed import TimedChat

FOLDERS = {"float32": "float", "bfloat16": "float", "int8": "int8", "int4": "int4"}


def load_chat(options: Options) -> lapilli.Chat:
    """kind: float32, bfloat16, int8, int4; `int4-loading` rounds the float files while it reads."""
    torch.set_num_threads(options.threads)
    if options.kind.endswith("-loading"):
        quantize = options.kind.removesuffix("-loading")
        return lapilli.load(str(options.files / "float"), device="cpu", quantize=quantize)
    folder = options.files / FOLDERS[options.kind]
    dtype = options.kind if folder.name == "float" else "auto"
    return lapilli.load(str(folder), device="cpu", dtype=dtype)


def load(options: Options) -> TimedChat:
    """A chat's engine with a clock."""
    return TimedChat(load_chat(options))
