"""One engine in one process: loads the checkpoint, answers, prints its figures as JSON.

    python -m benchmarks.child ENGINE CHECKPOINT --dtype float32 --new-tokens 64 --repeats 3

Every repeat shows a new picture, so that no cache can help. An engine is a function that imports
what it needs and returns `load(directory, dtype)`; that returns `answer(pixel_values, new_tokens)`,
which runs tower, prefill and decoding.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

IMAGE_ID = 31999  # an entry of the vocabulary that stands for the picture
NUM_VISUAL = 576
NUM_TEXT = 40
Answer = Callable[[torch.Tensor, int], int]
Load = Callable[[Path, torch.dtype], Answer]


def prompt_ids() -> list[int]:
    """BOS, the picture, then text: 616 positions in all."""
    text = torch.randint(10, 900, (NUM_TEXT - 1,), generator=torch.Generator().manual_seed(1))
    return [1, *[IMAGE_ID] * NUM_VISUAL, *text.tolist()]


def import_lapilli() -> Load:
    """The path of `Chat.answer`, entered where the pixels are ready."""
    from lapilli.checkpoint.load import load_checkpoint
    from lapilli.config.generation import SamplingParams
    from lapilli.generate.run import generate
    from lapilli.geometry import ImageSize
    from lapilli.modality.image.pixels import PreparedImage
    from lapilli.prompt.encode import PLACEHOLDER, EncodedPrompt, Span

    ids = [PLACEHOLDER if i == IMAGE_ID else i for i in prompt_ids()]
    prompt = EncodedPrompt(ids, [False] * len(ids), (Span(0, 1, NUM_VISUAL),))

    def load(folder: Path, dtype: torch.dtype) -> Answer:
        loaded = load_checkpoint(folder, device="cpu", dtype=dtype)

        def answer(pixel_values: torch.Tensor, new_tokens: int) -> int:
            params = SamplingParams(max_new_tokens=new_tokens)
            item = PreparedImage(pixel_values, ImageSize(336, 336))
            with torch.inference_mode():
                batch = loaded.model.embed_prompts([prompt], [[item]])
                done = generate(loaded.model, batch, params, tokenizer=loaded.tokenizer, eos_ids=())
            return len(done[0].token_ids)

        return answer

    return load


def import_transformers() -> Load:
    """`LlavaForConditionalGeneration.generate` with its own defaults."""
    from transformers import LlavaForConditionalGeneration

    ids = torch.tensor([prompt_ids()])

    def load(folder: Path, dtype: torch.dtype) -> Answer:
        model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype).eval()

        def answer(pixel_values: torch.Tensor, new_tokens: int) -> int:
            with torch.inference_mode():
                done = model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    pixel_values=pixel_values.to(dtype),
                    do_sample=False,
                    min_new_tokens=new_tokens,
                    max_new_tokens=new_tokens,
                    pad_token_id=0,
                )
            return int(done.shape[1]) - ids.shape[1]

        return answer

    return load


ENGINES = {"lapilli": import_lapilli, "transformers": import_transformers}


def peak_bytes() -> int:
    """Highest resident memory of this process so far (Linux).

    Not ru_maxrss: that one starts from the memory of the process that started this one.
    """
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engine", choices=sorted(ENGINES))
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    wanted = parser.parse_args()
    torch.set_num_threads(wanted.threads)
    dtype = getattr(torch, wanted.dtype)

    before = peak_bytes()
    started = time.perf_counter()
    load = ENGINES[wanted.engine]()
    import_s = time.perf_counter() - started
    started = time.perf_counter()
    answer = load(wanted.checkpoint, dtype)
    load_s = time.perf_counter() - started
    loaded = peak_bytes()
    first: list[float] = []
    rates: list[float] = []
    for repeat in range(wanted.repeats + 1):
        seeded = torch.Generator().manual_seed(repeat)
        pixel_values = torch.randn(1, 3, 336, 336, generator=seeded)
        started = time.perf_counter()
        answer(pixel_values, 1)
        to_first = time.perf_counter() - started
        started = time.perf_counter()
        count = answer(torch.randn(1, 3, 336, 336, generator=seeded), wanted.new_tokens)
        rest = time.perf_counter() - started - to_first
        if repeat:  # the first one warms up
            first.append(to_first)
            rates.append((count - 1) / rest)
    print(
        json.dumps(
            {
                "engine": wanted.engine,
                "import_s": import_s,
                "load_s": load_s,
                "first_token_s": statistics.median(first),
                "tokens_per_s": statistics.median(rates),
                "start_bytes": before,
                "load_peak_bytes": loaded,
                "peak_bytes": peak_bytes(),
            }
        )
    )


if __name__ == "__main__":
    main()
