"""The child that renders chat templates: started when it is needed, spoken to by one thread at a time, replaced when it
is gone.

It ends itself: the kernel signals it when a rendering takes too long, and the end of its input ends it with us, however
we went. So nothing here watches a clock; reading its answer waits without Python's lock.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from distill.errors import CheckpointError, DataError, EnvironmentFault

WORKER = Path(__file__).with_name("worker.py")
PACKAGES = ("jinja2", "markupsafe")
# A conversation renders in well under a millisecond, one of a million tokens in a tenth of a second.
CPU_S, CPU_S_PER_CONVERSATION = 2.0, 0.01
# The clock is for what takes no processor time; a machine that has much else to do must not end a rendering.
CLOCK_PER_CPU = 30
MEMORY_BYTES = 512 << 20
# A template writes its conversation once, or a few times, and some text of its own.
MAX_CHARACTERS, MAX_CHARACTERS_PER_CHARACTER = 1 << 20, 8
MAX_TEMPLATE_CHARACTERS = 1 << 20
MAX_TEMPLATES = 32  # that a child keeps compiled; then it makes room for another
LENGTH_BYTES = 8


class TemplateRefusal(DataError):
    """The template itself refuses a conversation, by `raise_exception`: a role that it does not know, say."""


class Room:
    """A child that renders, once there is something to render."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._known: set[str] = set()
        atexit.register(self.close)

    def render(self, source: str, settings: str, conversations: list[str], *, where: str) -> list[str]:
        """The texts of conversations, which are JSON as the `settings` are. Raises as `chat_templates.render` does.

        `where` is what a fault calls the template.
        """
        if len(source) > MAX_TEMPLATE_CHARACTERS:
            message = f"has {len(source)} characters; at most {MAX_TEMPLATE_CHARACTERS} are rendered"
            raise CheckpointError(message, where=where)
        num_characters = len(settings) + sum(map(len, conversations))
        name = hashlib.sha256(source.encode("utf-8", "surrogatepass")).hexdigest()
        with self._lock:
            child = self._alive(where)
            head: dict[str, Any] = {
                "template": name,
                "source": None if name in self._known else source,
                "cpu_s": CPU_S + CPU_S_PER_CONVERSATION * len(conversations),
                "max_characters": MAX_CHARACTERS + MAX_CHARACTERS_PER_CHARACTER * num_characters,
            }
            answer = self._exchange(child, json.dumps(head), settings, f"[{','.join(conversations)}]")
            if answer is None:
                raise self._post_mortem(child, head["cpu_s"], where)
            if "texts" in answer:
                self._known.add(name)
        if "texts" in answer:
            texts: list[str] = answer["texts"]
            return texts
        kind = TemplateRefusal if answer["refused"] else CheckpointError
        raise kind(answer["fault"], where=None if answer["refused"] else where)

    def close(self) -> None:
        """End the child and wait for it."""
        with self._lock:
            self._end()

    def _alive(self, where: str) -> subprocess.Popen[bytes]:
        if self._child is not None and self._child.poll() is None and len(self._known) < MAX_TEMPLATES:
            return self._child
        self._end()
        found = [importlib.util.find_spec(package) for package in PACKAGES]
        folders = {str(Path(spec.origin).parent.parent) for spec in found if spec is not None and spec.origin}
        arguments = [str(CLOCK_PER_CPU), str(MEMORY_BYTES), *sorted(folders)]
        zone = {name: os.environ[name] for name in ("TZ",) if name in os.environ}
        try:
            # A session of its own: Ctrl-C is for us. No variables of ours: none is a template's business.
            self._child = subprocess.Popen(
                [sys.executable, "-I", "-S", str(WORKER), *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=zone,
                start_new_session=True,
            )
        except OSError as exc:
            raise EnvironmentFault(f"no process can be started to render it ({exc.strerror})", where=where) from exc
        return self._child

    def _end(self) -> None:
        child, self._child = self._child, None
        self._known.clear()
        if child is not None:
            assert child.stdin is not None
            assert child.stdout is not None
            with contextlib.suppress(OSError):
                child.stdin.close()
            child.stdout.close()
            child.wait()

    def _exchange(self, child: subprocess.Popen[bytes], *frames: str) -> dict[str, Any] | None:
        """The child's answer; None where it ended."""
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            for frame in frames:
                data = frame.encode()
                child.stdin.write(len(data).to_bytes(LENGTH_BYTES, "big") + data)
            child.stdin.flush()
            length = child.stdout.read(LENGTH_BYTES)
            data = child.stdout.read(int.from_bytes(length, "big")) if len(length) == LENGTH_BYTES else b""
        except BrokenPipeError:
            return None
        except BaseException:  # Ctrl-C: whoever speaks next must not hear this answer
            child.kill()
            self._end()
            raise
        answer: dict[str, Any] | None = json.loads(data) if data else None
        return answer

    def _post_mortem(
        self, child: subprocess.Popen[bytes], cpu_s: float, where: str
    ) -> CheckpointError | EnvironmentFault:
        self._end()
        if child.returncode in (-signal.SIGPROF, -signal.SIGALRM):
            return CheckpointError(f"is not rendered within {cpu_s:.0f} s", where=where)
        if child.returncode == -signal.SIGKILL:
            return EnvironmentFault("the process that rendered it was killed", where=where)
        if child.returncode < 0:
            signalled = signal.Signals(-child.returncode).name
            return CheckpointError(f"breaks the process that renders it ({signalled})", where=where)
        return EnvironmentFault(f"the process that renders it ended with {child.returncode}", where=where)
