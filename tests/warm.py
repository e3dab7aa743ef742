"""The program `lapilli`, forked for each call from a process that has imported torch already.

Starting Python and importing torch costs two seconds, which two hundred tests would pay. What runs
is a process all the same: its own streams, folder, environment and exit code, and `main()` as in
the installed script. What happens before `main()` is tested with the installed script itself,
`tests.cli.conftest.PROGRAM`.

`python tests/warm.py SOCKET` is the process with torch; the script that `start_warm` writes hands
its arguments and streams to it and ends with the exit code that comes back.
"""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

STREAMS = (0, 1, 2)
NAMES = ("stdin", "stdout", "stderr")


@contextmanager
def start_warm(folder: Path) -> Iterator[Path]:
    """A folder with a script `lapilli`, and the process behind it until the block ends."""
    address = folder / "socket"
    scripts = folder / "bin"
    scripts.mkdir()
    script = scripts / "lapilli"
    here = shlex.quote(str(Path(__file__)))
    python = shlex.quote(sys.executable)
    script.write_text(f'#!/bin/sh\nexec {python} -IS {here} {shlex.quote(str(address))} "$@"\n')
    script.chmod(0o755)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, __file__, str(address)], env=environment, stdin=subprocess.DEVNULL
    )
    try:
        yield scripts
    finally:
        process.kill()
        process.wait()


def is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def ask(address: str, arguments: list[str]) -> int:
    """Have `lapilli` run with our arguments, streams, folder and environment: its exit code."""
    streams = [number for number in STREAMS if is_open(number)]
    told = {
        "arguments": arguments,
        "folder": str(Path.cwd()),
        "environment": dict(os.environ),
        "streams": streams,
    }
    with connect(address) as line:
        data = json.dumps(told).encode()
        socket.send_fds(line, [len(data).to_bytes(8, "little")], streams)
        line.sendall(data)
        code = line.recv(8)
    return int.from_bytes(code, "little") if code else 255


def connect(address: str) -> socket.socket:
    """The line to the warm process, which may still be importing."""
    for _ in range(1200):
        line = socket.socket(socket.AF_UNIX)
        try:
            line.connect(address)
        except (FileNotFoundError, ConnectionRefusedError):
            line.close()
            time.sleep(0.1)
        else:
            return line
    raise TimeoutError(f"nobody listens at {address}")


def serve(address: str) -> list[str]:
    """Wait for calls; comes back in each fork, with its arguments, where `main()` is to be run."""
    from lapilli.cli import main  # noqa: F401
    from lapilli.pipeline import load  # noqa: F401  torch with it
    from lapilli.train import launch  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # forks leave no zombies
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(f"{address}.new")
        door.listen(8)
        Path(f"{address}.new").rename(address)
        while True:
            line, _ = door.accept()
            if os.fork() == 0:
                break
            line.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    length, streams, _, _ = socket.recv_fds(line, 8, len(STREAMS))
    with line.makefile("rb") as file:
        told = json.loads(file.read(int.from_bytes(length, "little")))
    if child := os.fork():
        for stream in streams:
            os.close(stream)
        _, status = os.waitpid(child, 0)
        line.sendall((os.waitstatus_to_exitcode(status) % 256).to_bytes(8, "little"))
        os._exit(0)
    line.close()
    take_streams(dict(zip(told["streams"], streams, strict=True)))
    os.environ.clear()
    os.environ.update(told["environment"])
    os.chdir(told["folder"])
    return told["arguments"]


def take_streams(streams: dict[int, int]) -> None:
    """Make the files `streams[0]`, `[1]` and `[2]` the standard ones; what is missing is closed."""
    for number, name in enumerate(NAMES):
        if number in streams:
            os.dup2(streams[number], number)
            os.close(streams[number])
            mode = "r" if number == 0 else "w"
            stream = open(number, mode, 1 if number == 2 else -1, closefd=False)  # noqa: SIM115
        else:
            os.close(number)
            stream = None
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


if __name__ == "__main__":
    if sys.flags.isolated:
        sys.exit(ask(sys.argv[1], sys.argv[2:]))
    sys.argv = ["lapilli", *serve(sys.argv[1])]
    from lapilli.cli.main import main

    main()
