"""One server of ours: started below a keeper, watched while it lives, started again where it died.

What is started is any program that answers `GET /health` on a port of loopback; `teacher.backends.vllm.launch` says
which. Its output goes to a log file. A server that no longer answers counts as dead and is ended. The keeper
(`teacher.backends.vllm.keeper`) ends everything when this process is gone, however it went.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from distill.errors import EnvironmentFault
from distill.progress import Progress, silent

KEEPER = Path(__file__).with_name("keeper.py")
POLL_S = 0.25
# A loaded server may take seconds to say that it is well; one that says nothing for a minute is not.
WATCH_EVERY_S = 5.0
WATCH_TIMEOUT_S = 20.0
MAX_SILENCE_S = 60.0
GRACE_S = 20.0
TAIL_BYTES = 64_000


class Server:
    """A server process at `url`. `command` starts it; `secret` is what must not be shown from its log.

    `output` is a log file, opened for appending; None hands this process's own output on.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        url: str,
        environment: Mapping[str, str],
        startup_timeout_s: float,
        max_restarts: int,
        log: Path | None = None,
        secret: str = "",
        name: str = "vLLM",
        progress: Progress | None = None,
    ) -> None:
        self.url = url
        self.name = name
        self.log = log
        self._command = list(command)
        self._environment = {**os.environ, **environment}
        self._startup_timeout_s = startup_timeout_s
        self._restarts_left = max_restarts
        self._max_restarts = max_restarts
        self._secret = secret
        self._progress = progress or silent()
        self._keeper: subprocess.Popen[bytes] | None = None
        self._stopped = threading.Event()
        self._silent = False

    @property
    def alive(self) -> bool:
        return self._keeper is not None and self._keeper.poll() is None

    @property
    def started(self) -> bool:
        """True once it has been started."""
        return self._keeper is not None

    def start(self, *, wait: bool = True) -> None:
        """Start it and wait until it is healthy. Raises EnvironmentFault where it ends or takes too long."""
        with contextlib.ExitStack() as stack:
            output: IO[bytes] | None = None
            if self.log is not None:
                self.log.parent.mkdir(parents=True, exist_ok=True)
                output = stack.enter_context(self.log.open("ab"))
            keeper = [sys.executable, "-I", "-S", str(KEEPER), str(os.getpid()), str(GRACE_S), *self._command]
            self._keeper = subprocess.Popen(
                keeper,
                env=self._environment,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self._stopped = threading.Event()
        self._silent = False
        if not wait:
            return
        try:
            self._wait_until_healthy()
        except BaseException:
            self.stop()
            raise
        threading.Thread(target=self._watch, args=(self._keeper, self._stopped), daemon=True).start()

    def restart(self, *, wait: bool = True) -> None:
        """Start it again after it died. Raises EnvironmentFault where that was done too often already."""
        why = f"ended with {self._status()}" if not self._silent else f"was silent for {MAX_SILENCE_S:g} s"
        self.stop()
        if self._restarts_left == 0:
            message = f"{self.name} {why} and was started again {self._max_restarts} times already{self._last_words()}"
            raise EnvironmentFault(message, where=self.log)
        self._restarts_left -= 1
        self.start(wait=wait)

    def stop(self) -> None:
        """End it and all that it started; returns when they are gone."""
        self._stopped.set()
        if self._keeper is not None:
            if self._keeper.stdin is not None:
                with contextlib.suppress(OSError):
                    self._keeper.stdin.close()
            self._keeper.wait()

    def wait(self) -> int:
        """Wait until it ends; its exit status."""
        assert self._keeper is not None
        return self._keeper.wait()

    def _wait_until_healthy(self) -> None:
        started = shown = time.monotonic()
        limit = self._startup_timeout_s
        with self._progress.task(f"start {self.name}", total=limit, unit="s") as task:
            while (now := time.monotonic()) - started < limit:
                if not self.alive:
                    message = f"{self.name} ended with {self._status()} while it started{self._last_words()}"
                    raise EnvironmentFault(message, where=self.log)
                if _is_healthy(self.url):
                    return
                task.advance(now - shown)
                shown = now
                time.sleep(POLL_S)
        message = f"{self.name} was not up after {limit:.0f} s (teacher.startup_timeout_s){self._last_words()}"
        raise EnvironmentFault(message, where=self.log)

    def _watch(self, keeper: subprocess.Popen[bytes], stopped: threading.Event) -> None:
        """Ends a server that lives but does not answer: the connections to it break, and it is started again."""
        heard = time.monotonic()
        while not stopped.wait(WATCH_EVERY_S) and keeper.poll() is None:
            if _is_healthy(self.url):
                heard = time.monotonic()
            elif time.monotonic() - heard > MAX_SILENCE_S:
                self._silent = True
                keeper.terminate()
                return

    def _status(self) -> str:
        status = self._keeper.poll() if self._keeper is not None else None
        return "no status" if status is None else f"status {status}"

    def _last_words(self) -> str:
        """The failure in the words of the log, in one line: the last line that names an error, else the last one."""
        if self.log is None or not self.log.exists():
            return ""
        with self.log.open("rb") as file:
            file.seek(max(0, self.log.stat().st_size - TAIL_BYTES))
            lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if "Error" in line or "error:" in line]
        said = (errors or lines or [""])[-1]
        if self._secret:
            said = said.replace(self._secret, "***")
        return f": {said[:300]}" if said else ""


# The server is on this machine: a proxy of the environment has nothing to do with it.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def _is_healthy(url: str) -> bool:
    try:
        with _OPENER.open(f"{url}/health", timeout=WATCH_TIMEOUT_S) as response:
            return bool(response.status == 200)
    except (OSError, http.client.HTTPException):
        return False
