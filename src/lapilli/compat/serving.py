"""Controller and worker of the original's demo (llava.serve), over plain HTTP.

    client --/worker_generate_stream--> Controller --> ModelWorker --> answers ended by a zero byte

Every address takes JSON by POST. Source: reference of the original, section 9.
"""

import argparse
import contextlib
import json
import queue
import random
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from http.client import HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.request import Request, urlopen

from transformers import TextIteratorStreamer

from lapilli.compat.evaluation import LoadedModel
from lapilli.compat.mm_utils import (
    CONTROLLER_HEART_BEAT_EXPIRATION,
    DEFAULT_IMAGE_TOKEN,
    WORKER_HEART_BEAT_INTERVAL,
    build_logger,
    load_image_from_base64,
    server_error_msg,
)
from lapilli.errors import LapilliError

Answer = Callable[[Mapping[str, Any]], Any]
TIMEOUT_S = 5.0


def ask(address: str, **content: object) -> Any:  # noqa: ANN401
    """Return what an address answers; None where it does not."""
    try:
        with _post(address, content, TIMEOUT_S) as answer:
            return json.loads(answer.read())
    except (OSError, HTTPException, ValueError):
        return None


def _post(address: str, content: Mapping[str, Any], timeout_s: float) -> Any:  # noqa: ANN401
    if not address.startswith(("http://", "https://")):
        raise ValueError(f"{address} is no address of a worker or controller: expected http://...")
    body = json.dumps(dict(content)).encode()
    request = Request(address, body, {"Content-Type": "application/json"})  # noqa: S310  above
    return urlopen(request, timeout=timeout_s)  # noqa: S310


def as_line(text: str, code: int) -> bytes:
    """Return one piece of an answer: JSON and a zero byte."""
    return json.dumps({"text": text, "error_code": code}).encode() + b"\0"


@dataclass
class WorkerInfo:
    """Record of a worker in the controller."""

    model_names: list[str]
    speed: int | float
    queue_length: int
    check_heart_beat: bool
    last_heart_beat: float


class Controller:
    """Controller that knows which workers live, and sends each request to one of them.

    `dispatch_method` is "shortest_queue", or "lottery" by speed.
    """

    def __init__(self, dispatch_method: str = "shortest_queue") -> None:
        self.dispatch_method = dispatch_method
        self.worker_info: dict[str, WorkerInfo] = {}

    def register_worker(
        self, worker_name: str, check_heart_beat: bool, worker_status: Mapping[str, Any] | None
    ) -> bool:
        """Take a worker in; return False where it does not say what it has."""
        status = worker_status or self.get_worker_status(worker_name)
        if not status:
            return False
        facts = (status["model_names"], status["speed"], status["queue_length"])
        self.worker_info[worker_name] = WorkerInfo(*facts, check_heart_beat, time.time())
        return True

    def get_worker_status(self, worker_name: str) -> Any:  # noqa: ANN401
        """Ask a worker what it has."""
        return ask(f"{worker_name}/worker_get_status")

    def refresh_all_workers(self) -> None:
        """Ask every worker again and forget those that do not answer."""
        known, self.worker_info = self.worker_info, {}
        for name, info in known.items():
            self.register_worker(name, info.check_heart_beat, None)

    def remove_stale_workers_by_expiration(self) -> None:
        """Forget the workers that have been silent for too long."""
        oldest = time.time() - CONTROLLER_HEART_BEAT_EXPIRATION
        for name, info in list(self.worker_info.items()):
            if info.check_heart_beat and info.last_heart_beat < oldest:
                del self.worker_info[name]

    def list_models(self) -> list[str]:
        """Return the names of all models."""
        return sorted({name for info in self.worker_info.values() for name in info.model_names})

    def get_worker_address(self, model_name: str) -> str:
        """Return the worker of a model that a request goes to; "" where there is none."""
        able = {n: i for n, i in self.worker_info.items() if model_name in i.model_names}
        if not able:
            return ""
        if self.dispatch_method == "lottery":
            return random.choices(list(able), [info.speed for info in able.values()])[0]  # noqa: S311
        name = min(able, key=lambda worker: able[worker].queue_length / able[worker].speed)
        able[name].queue_length += 1
        return name

    def receive_heart_beat(self, worker_name: str, queue_length: int) -> bool:
        """Note that a worker lives; return False where it is not known and has to register."""
        info = self.worker_info.get(worker_name)
        if info is None:
            return False
        info.queue_length, info.last_heart_beat = queue_length, time.time()
        return True

    def worker_api_generate_stream(self, params: Mapping[str, Any]) -> Iterator[bytes]:
        """Pass a request on and its answer back."""
        address = self.get_worker_address(params["model"])
        if not address:
            yield as_line(server_error_msg, 2)
            return
        try:
            with _post(f"{address}/worker_generate_stream", params, 60.0) as answer:
                while piece := answer.read1():
                    yield piece
        except (OSError, HTTPException):
            yield as_line(server_error_msg, 3)

    def worker_api_get_status(self) -> dict[str, Any]:
        """Return what all workers have together, so that a controller can be another's worker."""
        known = self.worker_info.values()
        return {
            "model_names": self.list_models(),
            "speed": sum(info.speed for info in known),
            "queue_length": sum(info.queue_length for info in known),
        }

    def paths(self) -> dict[str, Answer]:
        """Return what every address does."""
        return {
            "/register_worker": lambda r: self.register_worker(
                r["worker_name"], r["check_heart_beat"], r.get("worker_status")
            ),
            "/refresh_all_workers": lambda _: self.refresh_all_workers(),
            "/list_models": lambda _: {"models": self.list_models()},
            "/get_worker_address": lambda r: {"address": self.get_worker_address(r["model"])},
            "/receive_heart_beat": lambda r: {
                "exist": self.receive_heart_beat(r["worker_name"], r["queue_length"])
            },
            "/worker_generate_stream": self.worker_api_generate_stream,
            "/worker_get_status": lambda _: self.worker_api_get_status(),
        }


class ModelWorker:
    """Worker with one model that answers requests; `limit` of them at once, the others wait."""

    def __init__(
        self,
        controller_addr: str,
        worker_addr: str,
        worker_id: str,
        no_register: bool,
        model_path: str,
        model_base: str | None,
        model_name: str | None,
        load_8bit: bool = False,
        load_4bit: bool = False,
        device: str = "cuda",
        use_flash_attn: bool = False,
        *,
        limit: int = 5,
    ) -> None:
        self.controller_addr, self.worker_addr = controller_addr, worker_addr
        asked = argparse.Namespace(
            model_path=model_path,
            model_base=model_base,
            load_8bit=load_8bit,
            load_4bit=load_4bit,
            device=device,
            use_flash_attn=use_flash_attn,
        )
        self.loaded = LoadedModel(asked, model_name)
        self.model_name = self.loaded.name
        self.logger = build_logger("model_worker", f"model_worker_{worker_id}.log")
        self._free, self._lock, self._waiting = threading.Semaphore(limit), threading.Lock(), 0
        if not no_register:
            self.register_to_controller()
            _every(WORKER_HEART_BEAT_INTERVAL, self.send_heart_beat)

    def register_to_controller(self) -> None:
        """Tell the controller that this worker is there."""
        ask(
            f"{self.controller_addr}/register_worker",
            worker_name=self.worker_addr,
            check_heart_beat=True,
            worker_status=self.get_status(),
        )

    def send_heart_beat(self) -> None:
        """Tell the controller that this worker lives, and register where it is not known."""
        answer = ask(
            f"{self.controller_addr}/receive_heart_beat",
            worker_name=self.worker_addr,
            queue_length=self.get_queue_length(),
        )
        if answer is not None and not answer["exist"]:
            self.register_to_controller()

    def get_queue_length(self) -> int:
        """Return how many requests are answered or wait."""
        return self._waiting

    def get_status(self) -> dict[str, Any]:
        """Return what the controller wants to know."""
        length = self.get_queue_length()
        return {"model_names": [self.model_name], "speed": 1, "queue_length": length}

    def generate_stream(self, params: Mapping[str, Any]) -> Iterator[bytes]:
        """Answer a request: the prompt and all text so far, again and again.

        Raises:
            ValueError: other numbers of pictures than of `<image>`.
        """
        prompt, loaded = params["prompt"], self.loaded
        pictures = [load_image_from_base64(image) for image in params.get("images") or ()]
        if len(pictures) != prompt.count(DEFAULT_IMAGE_TOKEN):
            raise ValueError("Number of images does not match number of <image> tokens in prompt")
        inputs = loaded.inputs(prompt.replace(DEFAULT_IMAGE_TOKEN, loaded.image_token), pictures)
        taken = inputs["inputs"].shape[1]
        if pictures:
            taken += len(pictures) * loaded.model.get_vision_tower().num_patches
        longest = getattr(loaded.model.config, "max_position_embeddings", 2048)
        limit = min(int(params.get("max_new_tokens", 256)), 1024, longest - taken)
        if limit < 1:
            over = "Exceeds max token length. Please start a new conversation, thanks."
            yield as_line(prompt + over, 0)
            return
        temperature = float(params.get("temperature", 1.0))
        streamer: Any = TextIteratorStreamer(
            loaded.tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=15
        )
        options = {
            "do_sample": temperature > 0.001,
            "temperature": temperature,
            "top_p": float(params.get("top_p", 1.0)),
            "max_new_tokens": limit,
            "streamer": streamer,
        }
        call = {**inputs, **options}
        threading.Thread(target=loaded.model.generate, kwargs=call, daemon=True).start()
        stop, answer = params.get("stop"), prompt
        for piece in streamer:
            answer += piece
            if stop and answer.endswith(stop):
                answer = answer[: -len(stop)]
            yield as_line(answer, 0)

    def generate_stream_gate(self, params: Mapping[str, Any]) -> Iterator[bytes]:
        """Answer a request when its turn comes; a fault becomes the code 1."""
        with self._lock:
            self._waiting += 1
        try:
            with self._free:
                yield from self.generate_stream(params)
        except (LapilliError, ValueError, OSError, RuntimeError, KeyError, queue.Empty):
            self.logger.exception("a request failed")
            yield as_line(server_error_msg, 1)
        finally:
            with self._lock:
                self._waiting -= 1

    def paths(self) -> dict[str, Answer]:
        """Return what every address does."""
        return {
            "/worker_generate_stream": self.generate_stream_gate,
            "/worker_get_status": lambda _: self.get_status(),
        }


def serve(host: str, port: int, paths: Mapping[str, Answer]) -> ThreadingHTTPServer:
    """Return a server that answers every address; `serve_forever` starts it."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            content = json.loads(self.rfile.read(length) or b"{}")
            if self.path not in paths:
                self.send_error(404)
                return
            answer = paths[self.path](content)
            pieces = answer if isinstance(answer, Iterator) else [json.dumps(answer).encode()]
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            with contextlib.suppress(ConnectionError):  # who asked has gone
                for piece in pieces:
                    self.wfile.write(piece)
                    self.wfile.flush()

        def log_message(self, *_: object) -> None:
            """Keep quiet: a line for every heart beat helps nobody."""

    return ThreadingHTTPServer((host, port), Handler)


def run(kind: str) -> None:
    """Run a controller or a worker with the options of the command line."""
    is_worker = kind == "model_worker"
    parser = argparse.ArgumentParser()
    parser.add_argument("--host", default="localhost")
    parser.add_argument("--port", type=int, default=21002 if is_worker else 21001)
    served: Controller | ModelWorker
    if not is_worker:
        methods = ["lottery", "shortest_queue"]
        parser.add_argument("--dispatch-method", choices=methods, default="shortest_queue")
        args = parser.parse_args()
        served = Controller(args.dispatch_method)
        _every(CONTROLLER_HEART_BEAT_EXPIRATION, served.remove_stale_workers_by_expiration)
    else:
        parser.add_argument("--worker-address", default="http://localhost:21002")
        parser.add_argument("--controller-address", default="http://localhost:21001")
        parser.add_argument("--model-path", default="facebook/opt-350m")
        parser.add_argument("--model-base")
        parser.add_argument("--model-name")
        parser.add_argument("--device", default="cuda")
        parser.add_argument("--limit-model-concurrency", type=int, default=5)
        parser.add_argument("--stream-interval", type=int, default=1)
        for name in ("multi-modal", "no-register", "load-8bit", "load-4bit", "use-flash-attn"):
            parser.add_argument(f"--{name}", action="store_true")
        args = parser.parse_args()
        served = ModelWorker(
            args.controller_address,
            args.worker_address,
            uuid.uuid4().hex[:6],
            args.no_register,
            args.model_path,
            args.model_base,
            args.model_name,
            args.load_8bit,
            args.load_4bit,
            args.device,
            args.use_flash_attn,
            limit=args.limit_model_concurrency,
        )
    serve(args.host, args.port, served.paths()).serve_forever()


def _every(seconds: float, act: Callable[[], object]) -> None:
    """Do something again and again, in a thread that ends with the program."""

    def repeat() -> None:
        while True:
            time.sleep(seconds)
            act()

    threading.Thread(target=repeat, daemon=True).start()
