"""Signal handler: SIGTERM and SIGINT are noted, and the loop stops at the end of a step.

signal --noted--> the step ends, the state is saved --> Stopped, an exit with a message
"""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(SystemExit):
    """A run that ends because a signal asked for it, with its state saved.

    Attributes:
        message: one line for a person.
    """

    def __init__(self, number: int, message: str) -> None:
        super().__init__(exit_code(number))
        self.message = message


class SignalHandler:
    """Inside `with SignalHandler() as watch:` the first such signal is only noted.

    The second one does what it always did, so that nobody waits for a step that hangs. Outside of
    the main thread nothing is caught: Python has no handlers there.
    """

    def __init__(self) -> None:
        self.seen: signal.Signals | None = None
        self._earlier: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "SignalHandler":
        if threading.current_thread() is threading.main_thread():
            self._earlier = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._give_back()

    def asked(self) -> bool:
        """Whether this process should end."""
        return self.seen is not None

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.seen = signal.Signals(number)
        self._give_back()

    def _give_back(self) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)
        self._earlier = {}


def exit_code(number: int) -> int:
    """What a shell reports of a program that this signal ended.

    Source: POSIX.1-2017, Shell Command Language 2.8.2.
    """
    return 128 + number
