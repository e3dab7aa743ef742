"""The server under load: many clients with pictures of their own, and what HTTP costs.

    python -m benchmarks.serve [MODEL] [--clients 64] [--seconds 60] [--out FILE]

    clients     each streams the answer about its own picture and compares it with the library's
    tokens/s    eight answers at the same time, by the server and by the bare engine, in turns
    health      how soon /health answers while 32 photographs of 12 megapixels are decoded
    start       of `lapilli serve`, until it is ready

Clients and server share the machine, so read the ratios.
"""

import argparse
import asyncio
import base64
import io
import json
import os
import re
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import psutil
from PIL import Image, ImageDraw

import lapilli
from benchmarks.machine import machine
from lapilli.config.generation import EngineOptions, SamplingParams
from lapilli.prompt.message import Message

COLOURS = ("red", "green", "blue", "yellow")
QUESTION = "What color is the circle?"
DESCRIBE = "What is in this picture?"
PATH = "/v1/chat/completions"
PROGRAM = (sys.executable, "-c", "from lapilli.cli.main import main; main()")
TOKENS, TOGETHER = 64, 8


def picture(number: int) -> bytes:
    """A PNG of one circle whose colour and place follow from the number."""
    rng = np.random.default_rng(number)
    side, radius = 160, 24
    x, y = rng.integers(radius + 8, side - radius - 8, 2).tolist()
    image = Image.new("RGB", (side, side), "white")
    box = (x - radius, y - radius, x + radius, y + radius)
    ImageDraw.Draw(image).ellipse(box, fill=COLOURS[number % len(COLOURS)])
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def body_of(image: bytes, question: str, **options):
    uri = "data:image/png;base64," + base64.b64encode(image).decode()
    content = [{"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": question}]
    return {"messages": [{"role": "user", "content": content}], "stream": True, **options}


@contextmanager
def server(model: str, *options: str):
    """`lapilli serve` as a process; yields it, its address and the seconds until it was ready."""
    started = time.perf_counter()
    process = subprocess.Popen(
        [*PROGRAM, "serve", model, "--port", "0", *options], stderr=subprocess.PIPE, text=True
    )
    try:
        for line in process.stderr:
            if found := re.search(r"ready on (http://\S+)", line):
                break
        else:
            raise SystemExit(f"the server ended with {process.wait()}")
        yield process, found[1], time.perf_counter() - started
    finally:
        process.terminate()
        process.wait()
        process.stderr.close()


class Connection:
    """One client over one socket: a general HTTP library would be busier than the server."""

    def __init__(self, address: str) -> None:
        parts = urlsplit(address)
        self._place = (parts.hostname, parts.port)
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, body: bytes) -> tuple[str, list[float]]:
        """The answer to one request, and the moments at which its pieces came."""
        if self._streams is None:
            self._streams = await asyncio.open_connection(*self._place)
        reader, writer = self._streams
        head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        if " 200 " not in head.partition("\r\n")[0]:
            raise RuntimeError(head.partition("\r\n")[0])
        times, said = [], []
        while size := int(await reader.readline(), 16):  # chunked, one chunk for an event
            chunk = await reader.readexactly(size + 2)
            came = time.perf_counter()
            for line in chunk.split(b"\n"):
                if line.startswith(b"data: {"):
                    event = json.loads(line[6:])
                    if "error" in event:
                        raise RuntimeError(event["error"]["message"])
                    text = event["choices"][0]["delta"].get("content")
                    if text:
                        times.append(came)
                        said.append(text)
        await reader.readline()
        return "".join(said).strip(), times

    async def close(self) -> None:
        """End it; it may ask again over a new socket."""
        if self._streams is not None:
            writer, self._streams = self._streams[1], None
            writer.close()
            with suppress(OSError):  # the other end may be gone
                await writer.wait_closed()


async def ask_once(address: str, body: bytes) -> tuple[str, list[float]]:
    """The answer to one request over a socket of its own, and when its pieces came."""
    connection = Connection(address)
    try:
        return await connection.ask(body)
    finally:
        await connection.close()


async def load(address: str, clients: int, seconds: float, right: dict[int, str]):
    """Clients that ask again and again; counts, and seconds between the pieces of an answer."""
    end = time.perf_counter() + seconds
    gaps, firsts, wrong, errors = [], [], [], []
    bodies = {key: json.dumps(body_of(picture(key), DESCRIBE)).encode() for key in right}
    asked = 0

    async def one(number: int) -> None:
        nonlocal asked
        connection, turn = Connection(address), 0
        while turn * clients < len(right) or time.perf_counter() < end:  # every picture once
            key = (number + clients * turn) % len(right)
            turn += 1
            asked += 1
            started = time.perf_counter()
            try:
                said, times = await connection.ask(bodies[key])
            except (OSError, RuntimeError, asyncio.IncompleteReadError) as error:
                errors.append(f"{type(error).__name__}: {error}")
                await connection.close()
                continue
            if said != right[key]:
                wrong.append((key, said, right[key]))
            if times:
                firsts.append(times[0] - started)
                gaps.extend(np.diff(times).tolist())
        await connection.close()

    await asyncio.gather(*(one(number) for number in range(clients)))
    return {
        "requests": asked,
        "wrong": len(wrong),
        "errors": len(errors),
        "first_errors": errors[:3],
        "gap_median_ms": 1e3 * statistics.median(gaps),
        "gap_p99_ms": 1e3 * float(np.percentile(gaps, 99)),
        "first_token_median_ms": 1e3 * statistics.median(firsts),
        "requests_per_second": asked / seconds,
    }


def library_answers(chat, count: int) -> dict[int, str]:
    questions = [[Message.user(DESCRIBE, picture(n))] for n in range(count)]
    return {n: answer.text.strip() for n, answer in enumerate(chat.batch(questions))}


def under_load(model: str, clients: int, seconds: float):
    """Errors, wrong answers, gaps and memory of a server with many clients."""
    right = library_answers(lapilli.load(model), 2 * clients)
    with server(model, "--rows", "16") as (process, address, ready):
        asyncio.run(load(address, clients, min(10.0, seconds / 4), right))  # warm
        memory = psutil.Process(process.pid)
        before = memory.memory_info().rss
        found = asyncio.run(load(address, clients, seconds, right))
        after = memory.memory_info().rss
    grown = (after - before) / 2**20
    ratio = found["gap_p99_ms"] / found["gap_median_ms"]
    return {
        **found,
        "gap_ratio": ratio,
        "memory_mib": before / 2**20,
        "grown_mib": grown,
        "ready_s": ready,
    }


def photograph(number: int) -> bytes:
    """A JPEG of 12 megapixels and some 3 MB, whose content follows from the number."""
    rng = np.random.default_rng(number)
    coarse = rng.integers(0, 256, (750, 1000, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((4000, 3000), Image.Resampling.BILINEAR)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=85)
    return out.getvalue()


async def health_while_decoding(address: str, photographs: list[bytes]):
    """Milliseconds until /health answers, asked again and again while photographs are read."""
    times: list[float] = []
    asking = asyncio.create_task(_ask_all(address, photographs))
    parts = urlsplit(address)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    while not asking.done():
        started = time.perf_counter()
        writer.write(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        await reader.readexactly(int(re.search(r"content-length: (\d+)", head)[1]))
        times.append(1e3 * (time.perf_counter() - started))
        await asyncio.sleep(0.005)
    await asking
    writer.close()
    await writer.wait_closed()
    p99 = float(np.percentile(times, 99))
    return {
        "photographs": len(photographs),
        "asked": len(times),
        "median_ms": statistics.median(times),
        "p99_ms": p99,
        "worst_ms": max(times),
    }


async def _ask_all(address: str, photographs: list[bytes]) -> None:
    bodies = [json.dumps(body_of(one, QUESTION, max_tokens=4)).encode() for one in photographs]
    await asyncio.gather(*(ask_once(address, body) for body in bodies))


def health(model: str, count: int = 32):
    """How soon /health answers beside photographs, by a server of its own."""
    photographs = [photograph(number) for number in range(count)]
    with server(model) as (_, address, _ready):
        return asyncio.run(health_while_decoding(address, photographs))


def beside_the_engine(model: str, rounds: int, quantize: str | None):
    """Tokens per second of eight answers at once: by HTTP, and by the engine in this process."""
    options = SamplingParams(max_new_tokens=TOKENS, temperature=0.0)
    images = [picture(number) for number in range(TOGETHER * (rounds + 1))]
    ours: list[float] = []
    theirs: list[float] = []
    more = ("--quantize", quantize) if quantize else ()
    bias = {"2": -100}
    with server(model, "--rows", str(TOGETHER), "--speculate", "off", *more) as (
        _,
        address,
        _ready,
    ):
        engine = EngineOptions(max_rows=TOGETHER, speculate="off")
        chat = lapilli.load(model, quantize=quantize, engine=engine)
        params = options.updated(logit_bias={2: -100.0})

        async def by_server(batch):
            bodies = [
                json.dumps(body_of(image, QUESTION, max_tokens=TOKENS, logit_bias=bias)).encode()
                for image in batch
            ]
            return await asyncio.gather(*(ask_once(address, body) for body in bodies))

        for turn in range(rounds + 1):
            batch = images[turn * TOGETHER : (turn + 1) * TOGETHER]
            # Threads spin for a while after their work: the other process waits for that.
            time.sleep(1)
            started = time.perf_counter()
            chat.batch([[Message.user(QUESTION, image)] for image in batch], params)
            engine_s = time.perf_counter() - started
            time.sleep(1)
            started = time.perf_counter()
            asyncio.run(by_server(batch))
            server_s = time.perf_counter() - started
            if turn:  # the first one warms
                ours.append(TOGETHER * TOKENS / server_s)
                theirs.append(TOGETHER * TOKENS / engine_s)
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return {
        "server_tokens_per_s": statistics.median(ours),
        "engine_tokens_per_s": statistics.median(theirs),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serve", description=__doc__)
    parser.add_argument("model", nargs="?", default="pebble")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quantize")
    parser.add_argument("--no-load", action="store_true", help="only beside the engine")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    found = {"machine": machine(), "model": given.model}
    if not given.no_load:
        found["load"] = under_load(given.model, given.clients, given.seconds)
        found["health"] = health(given.model)
    found["beside_the_engine"] = beside_the_engine(given.model, given.rounds, given.quantize)
    text = json.dumps(found, indent=1)
    if given.out:
        given.out.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
