"""A forward proxy on loopback that wants a password if told so, and a certificate for `endpoint.test` behind it.

It resolves every name to loopback, so that a test's endpoint may be called `endpoint.test`: loopback itself is never
asked through a proxy.
"""

from __future__ import annotations

import base64
import shutil
import socket
import socketserver
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

HOST = "endpoint.test"
VARIABLES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


class ForwardProxy:
    """Speaks CONNECT and plain forwarding. `heads` are the first requests of its connections, as they were sent;
    `passed` is everything that went through it, in either direction.

    Who comes without the password gets 407, with what was sent in every place where an answer has room for it.
    """

    def __init__(self, login: str | None = None) -> None:
        self.login = login
        self.heads: list[str] = []
        self.passed = bytearray()
        self.address = ""

    def handle(self, client: socket.socket) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            if not (piece := client.recv(65_536)):
                return
            head += piece
        head, _, body = head.partition(b"\r\n\r\n")
        first, *fields = head.decode().split("\r\n")
        self.heads.append(head.decode())
        given = next((field for field in fields if field.lower().startswith("proxy-authorization:")), "")
        if self.login is not None and given.partition(": ")[2] != f"Basic {encoded(self.login)}":
            said = f"not with {given} {base64.b64decode(given.rpartition(' ')[2] or b'').decode(errors='replace')}"
            answer = (
                f"HTTP/1.1 407 {said}\r\nx-said: {said}\r\nContent-Length: {len(said)}\r\nConnection: close\r\n\r\n"
            )
            client.sendall(f"{answer}{said}".encode())
            return
        method, target, _ = first.split()
        port = int(target.removeprefix("http://").partition("/")[0].rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)) as endpoint:
            if method == "CONNECT":
                client.sendall(b"HTTP/1.1 200 go on\r\n\r\n")
            else:
                # The path alone, as an endpoint expects it, and one request a connection.
                path = "/" + target.removeprefix("http://").partition("/")[2]
                kept = [field for field in fields if not field.lower().startswith(("proxy-", "connection:"))]
                kept = [f"{method} {path} HTTP/1.1", *kept, "Connection: close"]
                endpoint.sendall("\r\n".join(kept).encode() + b"\r\n\r\n" + body)
            back = threading.Thread(target=self._pass, args=(endpoint, client), daemon=True)
            back.start()
            self._pass(client, endpoint)
            back.join(20)

    def _pass(self, source: socket.socket, target: socket.socket) -> None:
        try:
            while piece := source.recv(65_536):
                self.passed += piece
                target.sendall(piece)
            target.shutdown(socket.SHUT_WR)
        except OSError:  # the other side has gone
            pass


@contextmanager
def proxying(login: str | None = None) -> Iterator[ForwardProxy]:
    proxy = ForwardProxy(login)

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            proxy.handle(self.request)

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True
        request_queue_size = 64

    with Server(("127.0.0.1", 0), Handler) as server:
        proxy.address = f"127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield proxy
        server.shutdown()
        thread.join(20)


def encoded(login: str) -> str:
    return base64.b64encode(login.encode()).decode()


def certificate(folder: Path) -> tuple[Path, Path]:
    """Key and self-signed certificate of `endpoint.test`, made with openssl; skips where there is none."""
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl command, to make a certificate")
    key, made = folder / "key.pem", folder / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    named = ["-days", "2", "-subj", f"/CN={HOST}", "-addext", f"subjectAltName=DNS:{HOST}"]
    subprocess.run([*command, *named, "-keyout", key, "-out", made], check=True, capture_output=True, timeout=60)
    return key, made
