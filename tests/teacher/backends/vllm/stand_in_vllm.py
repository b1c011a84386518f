"""Stands in for the program `vllm serve`: same command line, same routes, no model. It fails as its environment says.

Installed as a package `vllm` in a folder of its own, so that the backend starts it as it starts the real one. Answers
with the request's seed. `STAND_IN_DIES_AFTER=n`: every life ends with its n-th completion; `STAND_IN_LIVES=m`: from
the m-th life on it lives; `STAND_IN_HANGS=1`: the first life stops answering at its third completion;
`STAND_IN_SLOW=1`: never healthy; `STAND_IN_DAUGHTER=file`: starts a process in a session of its own that ignores
SIGTERM, and writes its id into the file. `STAND_IN_DELAY_S`: what a completion takes.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

VERSION = "0.31.0"
STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    served: str
    life: int
    lock = threading.Lock()
    completions = 0

    def do_GET(self) -> None:
        if self.path == "/health":
            self.answer({}, 503 if os.environ.get("STAND_IN_SLOW") else 200)
        elif self.path == "/version":
            self.answer({"version": "0.31.0"})
        elif self.path == "/v1/models" and self.authorised():
            self.answer({"data": [{"id": self.served}]})

    def do_POST(self) -> None:
        payload = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if not self.authorised():
            return
        with self.lock:
            Handler.completions += 1
            number = Handler.completions
        say(f"life {self.life}: completion {number}")
        if os.environ.get("STAND_IN_HANGS") and self.life == 1 and number == 3:
            os.kill(os.getpid(), signal.SIGSTOP)
        dies_after, lives = os.environ.get("STAND_IN_DIES_AFTER"), int(os.environ.get("STAND_IN_LIVES", "1000"))
        if dies_after and number >= int(dies_after) and self.life < lives:
            say(f"RuntimeError: engine died, the key was {os.environ['VLLM_API_KEY']}")
            os._exit(3)
        time.sleep(float(os.environ.get("STAND_IN_DELAY_S", "0")))
        message = {"role": "assistant", "content": f"seed {payload['seed']}</think>x"}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        usage = {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}
        if payload.get("stream"):
            self.stream(message, usage)
        else:
            self.answer({"id": "x", "object": "chat.completion", "choices": [choice], "usage": usage})

    def stream(self, message: dict[str, str], usage: dict[str, int]) -> None:
        first = {"choices": [{"index": 0, "delta": message, "finish_reason": None}]}
        last = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
        events = [json.dumps(event) for event in (first, last, {"choices": [], "usage": usage})]
        body = "".join(f"data: {event}\n\n" for event in [*events, "[DONE]"]).encode()
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def authorised(self) -> bool:
        right = self.headers.get("authorization") == f"Bearer {os.environ['VLLM_API_KEY']}"
        if not right:
            self.answer({"error": "Unauthorized"}, 401)
        return right

    def answer(self, body: dict, status: int = 200) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments: object) -> None:
        pass


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


class Listener(ThreadingHTTPServer):
    request_queue_size = 128
    daemon_threads = True


def install_stand_in(folder: Path) -> Path:
    """Write the package below `folder`; the result belongs first on the path."""
    program = folder / "packages" / "vllm" / "entrypoints" / "cli"
    program.mkdir(parents=True)
    for package in (program.parent.parent, program.parent, program):
        (package / "__init__.py").touch()
    shutil.copy(__file__, program / "main.py")
    write_version(folder / "packages", VERSION)
    return folder / "packages"


def write_version(packages: Path, version: str) -> None:
    metadata = packages / f"vllm-{VERSION}.dist-info"
    metadata.mkdir(exist_ok=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")


def main() -> None:
    arguments = sys.argv[1:]
    given = dict(itertools.pairwise(arguments))
    if "--nonsense" in given:
        sys.exit("vllm: error: unrecognized arguments: --nonsense")
    lives = Path(os.environ["STAND_IN_FOLDER"]) / "lives"
    lives.touch()
    lives.write_text(lives.read_text() + f"{os.getpid()} {json.dumps(arguments)}\n")
    Handler.served, Handler.life = given["--served-model-name"], len(lives.read_text().splitlines())
    if daughter := os.environ.get("STAND_IN_DAUGHTER"):
        process = subprocess.Popen([sys.executable, "-S", "-c", STUBBORN], start_new_session=True)
        Path(daughter).write_text(str(process.pid))
    with Listener((given["--host"], int(given["--port"])), Handler) as server:
        server.serve_forever()


if __name__ == "__main__":
    main()
