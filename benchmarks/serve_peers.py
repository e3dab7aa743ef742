"""The server beside those of llama.cpp and transformers, each with its own program.

    python -m benchmarks.serve_peers [--shape S] [--llama-server PROGRAM] [--out FILE]

    lapilli serve        int4, 8 rows
    llama-server         Q4_0 and a tower in float16, 8 slots
    transformers serve   the checkpoint as it is: one answer after the other, which is all it does

    eight at once   requests about new pictures, 64 tokens each: tokens a second, reading included
    decisions       400 questions about one picture: one call, beside 400 requests to llama-server;
                    "unlike": the same questions numbered, so that none begins as another

The model is that of `make bench`: random weights of a real shape (README.md). Servers take turns in
one run, all stay loaded, and only the one that is asked computes. Read the ratios.
"""

import argparse
import base64
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import httpx
from transformers import CLIPImageProcessor, LlamaTokenizer, LlavaProcessor

from benchmarks.checkpoint import IMAGE_ID, with_pictures, write_checkpoint, write_quantized
from benchmarks.contest import DTYPES
from benchmarks.machine import ROOT, machine, run_peer
from benchmarks.serve import COLOURS, PROGRAM, TOGETHER, TOKENS, picture

CHAT = "/v1/chat/completions"
QUESTION = "What is in this picture?"
TEMPLATE = (
    "{% for message in messages %}{{ message.role.upper() }}: {% for part in message.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% else %}<image>\n{% endif %}{% endfor %} "
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
PLAIN_TEMPLATE = (  # of texts with marks for pictures in them
    "{% for message in messages %}{{ message.role | upper }}: {{ message.content }} {% endfor %}"
    "ASSISTANT:"
)
OURS, LLAMA, TRANSFORMERS = "lapilli serve", "llama-server", "transformers serve"
DECISIONS, SIDE = 400, 336
TIMEOUT = 1800


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serve_peers", description=__doc__)
    parser.add_argument("--shape", default="S", choices=list(DTYPES))
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()) / "lapilli-peers"
    )
    parser.add_argument("--llama-server", type=Path, help="llama-quantize lies beside it")
    parser.add_argument("--peers-python", default=str(ROOT / ".venv-peers" / "bin" / "python"))
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--serving", type=Path, help="folder with what transformers serve imports")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(given.threads)
    with ExitStack() as stack:
        addresses = {
            name: stack.enter_context(running(command, health))
            for name, command, health in commands(given)
        }
        found = {"machine": machine(), "shape": given.shape, "threads": given.threads}
        found["eight"] = eight_at_once(addresses, given.rounds)
        found["decisions"] = decisions(addresses, given.rounds)
    text = json.dumps(found, indent=1)
    if given.out:
        given.out.write_text(text + "\n", encoding="utf-8")
    print(text)


def commands(given: argparse.Namespace) -> Iterator[tuple[str, Callable[[int], list[str]], str]]:
    """Yield name, command for a port, and the route that says that it is ready, of every server."""
    shape, threads = given.folder / given.shape, str(given.threads)
    source = write_checkpoint(given.shape, shape / "float", dtype=DTYPES[given.shape])
    quantized = with_pictures(write_quantized(source, shape / "int4", 4), shape / "served", SIDE)
    ours = [*PROGRAM, "serve", str(quantized), "--rows", str(TOGETHER), "--speculate", "off"]
    yield OURS, lambda port: [*ours, "--port", str(port), "-q"], "/ready"
    if given.llama_server:
        files = shape / "gguf"
        quantizer = given.llama_server.with_name("llama-quantize")
        arguments = (str(source), str(files), "Q4_0", "--threads", threads)
        run_peer(
            given.peers_python, "benchmarks.gguf_files", *arguments, "--quantizer", str(quantizer)
        )
        command = [str(given.llama_server), "-m", str(files / "Q4_0.gguf")]
        command += ["--mmproj", str(files / "mmproj.gguf"), "--chat-template", PLAIN_TEMPLATE]
        command += ["-np", str(TOGETHER), "-c", str(1024 * TOGETHER), "-t", threads]
        yield LLAMA, lambda port: [*command, "--port", str(port)], "/health"
    if given.serving:
        folder = with_processor(source, shape / "transformers")
        environment = ["env", f"PYTHONPATH={given.serving}"]
        program = str(Path(sys.executable).parent / "transformers")
        served = [*environment, program, "serve", str(folder), "--device", "cpu"]
        yield TRANSFORMERS, lambda port: [*served, "--port", str(port)], "/health"


def with_processor(source: Path, out: Path) -> Path:
    """Return a folder of the same weights with what transformers needs beside them."""
    if (out / "processor_config.json").exists():
        return out
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    for file in source.glob("*.safetensors*"):
        (out / file.name).symlink_to(file.resolve())
    shutil.copy(source / "config.json", out)
    tokenizer = LlamaTokenizer.from_pretrained(source)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    assert tokenizer.convert_tokens_to_ids("<image>") == IMAGE_ID
    LlavaProcessor(
        image_processor=CLIPImageProcessor.from_pretrained(source),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    ).save_pretrained(out)
    return out


@contextmanager
def running(command: Callable[[int], list[str]], health: str) -> Iterator[str]:
    """Start a server on a free port; yield its address once it is ready.

    Raises:
        SystemExit: it ended; what it said goes before.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command(port), stdout=said, stderr=said)
        address = f"http://127.0.0.1:{port}"
        try:
            while not _answers(address + health):
                if process.poll() is not None:
                    said.seek(0)
                    raise SystemExit(f"{command(port)[0]} ended: {said.read()[-2000:]}")
                time.sleep(0.5)
            yield address
        finally:
            process.terminate()
            process.wait()


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def asked(image: bytes, question: str, tokens: int) -> dict[str, Any]:
    """Return a request's body; greedy."""
    uri = "data:image/png;base64," + base64.b64encode(image).decode()
    content = [{"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": question}]
    return {
        "messages": [{"role": "user", "content": content}],
        "max_tokens": tokens,
        "temperature": 0,
    }


# No answer ends early, where a server lets one say so.
LONG = {OURS: {"logit_bias": {"2": -100}}, LLAMA: {"ignore_eos": True}, TRANSFORMERS: {}}


def ask(name: str, address: str, body: dict[str, Any]) -> int:
    """Return how many tokens the answer has.

    Raises:
        SystemExit: it is none; the message is what the server said.
    """
    found = _post(address + CHAT, {**body, **LONG[name]})
    return int(found["usage"]["completion_tokens"])


def _post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    answer = httpx.post(url, json=body, timeout=TIMEOUT)
    if answer.status_code != 200:
        raise SystemExit(f"{url}: {answer.status_code} {answer.text[:1000]}")
    found: dict[str, Any] = answer.json()
    return found


def ask_all(name: str, address: str, bodies: Sequence[dict[str, Any]]) -> int:
    """Return how many tokens the answers have, eight requests at a time."""
    with ThreadPoolExecutor(TOGETHER) as pool:
        return sum(pool.map(partial(ask, name, address), bodies))


def eight_at_once(addresses: dict[str, str], rounds: int) -> dict[str, Any]:
    """Return tokens a second of every server, and the ratios of the rounds."""
    speeds: dict[str, list[float]] = {name: [] for name in addresses}
    for name, address in addresses.items():  # what is made at the first request
        ask(name, address, asked(picture(0), QUESTION, 4))
    for turn in range(1, rounds + 1):
        pictures = [picture(TOGETHER * turn + number) for number in range(TOGETHER)]
        for name, address in addresses.items():
            time.sleep(1)  # threads of the one before spin for a while
            started = time.perf_counter()
            tokens = ask_all(name, address, [asked(image, QUESTION, TOKENS) for image in pictures])
            spent = time.perf_counter() - started
            print(f"{name}: {tokens} tokens in {spent:.1f} s", file=sys.stderr)
            speeds[name].append(tokens / spent)
    found: dict[str, Any] = {"tokens_per_s": {k: statistics.median(v) for k, v in speeds.items()}}
    found["ratios"] = {
        name: [a / b for a, b in zip(speeds[OURS], speeds[name], strict=True)]
        for name in addresses
        if name != OURS
    }
    return found


def decisions(addresses: dict[str, str], rounds: int) -> dict[str, Any]:
    """Return seconds of 400 questions about a picture, and of what they are compared with."""
    shapes, places = (
        ("circle", "square", "star", "cross"),
        ("left", "right", "top", "middle", "edge"),
    )
    sizes = ("small", "large", "tiny", "huge", "wide")
    questions = [
        f"Is there a {size} {colour} {shape} at the {place}?"
        for size, colour, shape, place in product(sizes, COLOURS, shapes, places)
    ][:DECISIONS]
    spent: dict[str, list[float]] = {}

    def timed(name: str, work: Callable[..., object], *given: object) -> None:
        time.sleep(1)
        started = time.perf_counter()
        work(*given)
        spent.setdefault(name, []).append(time.perf_counter() - started)
        print(f"{name}: {spent[name][-1]:.2f} s", file=sys.stderr)

    ours, theirs = addresses[OURS], addresses.get(LLAMA)
    for turn in range(rounds):
        new = 10_000 + 10 * turn
        timed("one", decide, ours, picture(new), questions[:1])
        timed("400", decide, ours, picture(new + 1), questions)
        unlike = [f"{number}. {question}" for number, question in enumerate(questions, 1)]
        timed("400 unlike", decide, ours, picture(new + 3), unlike)
        known = picture(new + 1)
        ask(OURS, ours, asked(known, QUESTION, 1))  # from here on its prompt is known
        timed("step x 0", ask, OURS, ours, asked(known, QUESTION, 1))
        timed("step x 64", ask, OURS, ours, asked(known, QUESTION, 65))
        if theirs:
            bodies = [asked(picture(new + 2), question, 1) for question in questions]
            timed("400 requests to llama-server", ask_all, LLAMA, theirs, bodies)
    found: dict[str, Any] = {name: statistics.median(times) for name, times in spent.items()}
    found["a step"] = (found["step x 64"] - found["step x 0"]) / 64
    steps = found["one"] + 400 * found["a step"]
    found["of one question and 400 steps"] = found["400"] / steps
    found["of one question and 400 steps, unlike"] = found["400 unlike"] / steps
    if theirs:
        requests = found["400 requests to llama-server"]
        found["llama-server's time"] = requests / found["400"]
        found["llama-server's time, unlike"] = requests / found["400 unlike"]
    return found


def decide(address: str, image: bytes, questions: Sequence[str]) -> None:
    """Ask `/v1/decisions` yes/no questions about a picture in one call."""
    uri = "data:image/png;base64," + base64.b64encode(image).decode()
    content = [{"type": "input_image", "image_url": uri}]
    body = {
        "input": [{"type": "message", "role": "user", "content": content}],
        "questions": [{"type": "predicate", "instructions": question} for question in questions],
    }
    _post(f"{address}/v1/decisions", body)


if __name__ == "__main__":
    main()
