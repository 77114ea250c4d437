"""Commands as a user at a terminal runs them: what comes to the terminal, and Ctrl-C, which all processes there get."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
# of a process: a group that gets Ctrl-C as the one in a terminal's foreground does; a shell's background jobs ignore it
IN_FOREGROUND: dict[str, Any] = {
    "start_new_session": True,
    "preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
}


def press_ctrl_c(process: subprocess.Popen[Any]) -> None:
    """Interrupt a process in the foreground and all that it has started there."""
    os.killpg(process.pid, signal.SIGINT)


class Terminal:
    """``python ARGUMENTS`` at a terminal of its own; ``shown`` is all that has come to it."""

    def __init__(self, environment: Mapping[str, str], *arguments: str) -> None:
        ours, theirs = os.openpty()
        self.shown = ""
        self.process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            env=environment,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            **IN_FOREGROUND,
        )
        os.close(theirs)
        self._screen = ours

    def wait_for(self, pattern: str, limit_s: float = 200) -> None:
        """Read until the pattern has come."""
        deadline = time.monotonic() + limit_s
        while not re.search(pattern, self.shown):
            assert time.monotonic() < deadline and self._read(), f"no {pattern!r}:\n{self.shown}"

    @property
    def left(self) -> str:
        """What stays on the screen: without what was erased, and the code that Ray's colorama writes at exit."""
        return re.sub(r"[^\n]*\r\x1b\[2K|\x1b\[0m", "", self.shown)

    def press_ctrl_c(self) -> None:
        """Interrupt all processes that the terminal's foreground holds."""
        press_ctrl_c(self.process)

    def end(self, limit_s: float = 200) -> int:
        """Read to the end; the process's status."""
        while self._read():
            pass
        os.close(self._screen)
        return self.process.wait(limit_s)

    def _read(self) -> bool:
        try:
            part = os.read(self._screen, 65536).decode()
        except OSError:  # what Linux says when nobody has the terminal open any more
            return False
        self.shown += part.replace("\r\n", "\n")
        return bool(part)
