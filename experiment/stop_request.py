"""How a run is stopped: by a signal or by its time limit, after the step in progress. What is kept is the
last epoch's end.

    stop = StopRequest(max_minutes=50)
    with stop.signals_heard():
        train(check=stop.check)          # StoppedError after the step in which it was asked to stop
    sys.exit(stop.exit_code)             # 130 (SIGINT), 143 (SIGTERM), 75 (time limit: run again)

A process that another one started for its own sake stops where that one has ended.

The first SIGINT or SIGTERM is a wish, the second an order: it ends the process at once, as it would one that
does not listen. A signal that comes twice within a second is one: `timeout` and some batch systems send it
to the process and to its group.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

from command_line import InputError

EXIT_RUN_AGAIN = 75  # EX_TEMPFAIL of sysexits.h
SIGNALS = (signal.SIGINT, signal.SIGTERM)
ONE_SIGNAL_SECONDS = 1.0
NOTICE = b"\nstopping after this step, the epoch in progress is lost; the same signal again stops at once\n"


class StoppedError(Exception):
    """Training was asked to stop; the message says by what."""


class StopRequest:
    """Whether a run is to stop, asked after every step. The clock starts at construction.

    parent: the process without which this one is not to go on. also: asked too, whether to stop."""

    def __init__(
        self,
        max_minutes: float | None = None,
        parent: int | None = None,
        also: Callable[[], bool] = lambda: False,
    ) -> None:
        if max_minutes is not None and not 0 < max_minutes < 1e6:
            raise InputError(f"--max-minutes must be above 0 and below 1e6, got {max_minutes}")
        self.max_minutes, self.parent, self.also = max_minutes, parent, also
        self.signum: int | None = None
        self._deadline = None if max_minutes is None else time.monotonic() + 60 * max_minutes
        self._heard = 0.0

    @property
    def reason(self) -> str:
        """Why to stop; empty where there is no reason to."""
        if self.signum is not None:
            return f"stopped by {signal.Signals(self.signum).name}"
        if self._deadline is not None and time.monotonic() >= self._deadline:
            return f"the time limit of {self.max_minutes:g} minutes was reached"
        if self.parent is not None and self.parent != os.getppid():
            return "the process that started this one has ended"
        if self.also():
            return "the run was asked to stop"
        return ""

    @property
    def minutes_left(self) -> float | None:
        """None where there is no limit, 0 where it was reached."""
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic()) / 60

    @property
    def exit_code(self) -> int:
        return EXIT_RUN_AGAIN if self.signum is None else 128 + self.signum

    def check(self) -> None:
        """Raise StoppedError where there is a reason to stop."""
        if self.reason:
            raise StoppedError(self.reason)

    @contextlib.contextmanager
    def signals_heard(self) -> Iterator[None]:
        """Take SIGINT and SIGTERM as requests meanwhile; outside the main thread nothing is changed."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {signum: signal.signal(signum, self._hear) for signum in SIGNALS}
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, signal.SIG_DFL if handler is None else handler)

    def _hear(self, signum: int, frame: object) -> None:
        now = time.monotonic()
        if self.signum is None:
            self.signum, self._heard = signum, now
            # Not by print, which must not be entered again where the signal came within one.
            with contextlib.suppress(OSError, ValueError):
                os.write(sys.stderr.fileno(), NOTICE)
        elif now - self._heard > ONE_SIGNAL_SECONDS:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
