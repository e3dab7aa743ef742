"""One model is run by one thread at a time: a lock for each language model of the process.

Engines and the plain loop take the same lock for every pass, so two engines on one model, or a chat
that is used from several threads, wait for each other and nothing meets.
"""

import os
import threading
import weakref


class ModelLock:
    """The lock of one language model; the thread that holds it may take it again.

    Taken as `with lock.turn:`, never through a function: an interrupt between the two would leave
    it locked for good.
    """

    def __init__(self) -> None:
        self.turn = threading.RLock()

    def renew(self) -> None:
        """Nobody holds it any more: those who did were not forked along."""
        self.turn = threading.RLock()


class _Locks:
    """The locks of all language models that are alive."""

    def __init__(self) -> None:
        self._finding = threading.Lock()
        self._found: weakref.WeakKeyDictionary[object, ModelLock] = weakref.WeakKeyDictionary()

    def of(self, language_model: object) -> ModelLock:
        with self._finding:
            return self._found.setdefault(language_model, ModelLock())

    def renew(self) -> None:
        self._finding = threading.Lock()
        for lock in list(self._found.values()):
            lock.renew()


_LOCKS = _Locks()


def lock_of(language_model: object) -> ModelLock:
    """The lock of this language model, the same one for everybody."""
    return _LOCKS.of(language_model)


if hasattr(os, "register_at_fork"):  # Windows does not fork
    os.register_at_fork(after_in_child=_LOCKS.renew)
