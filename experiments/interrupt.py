"""Ctrl-C that waits until all is saved."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class Interrupt(Exception):
    """Ctrl-C or SIGTERM, noted when it comes and raised where a run can stop without losing anything.

    A second Ctrl-C stops at once.
    """

    def __init__(self) -> None:
        super().__init__("interrupted")
        self.requested = False

    @classmethod
    @contextlib.contextmanager
    def watched(cls) -> Iterator[Interrupt]:
        """Notes the signals inside the block; outside the main thread, where Python allows no handlers, nothing."""
        interrupt = cls()
        if threading.current_thread() is not threading.main_thread():
            yield interrupt
            return

        def note(number: int, frame: FrameType | None) -> None:
            if interrupt.requested:
                raise KeyboardInterrupt
            interrupt.requested = True

        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield interrupt
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def check(self) -> None:
        """Raises itself if a signal has come."""
        if self.requested:
            raise self
