"""Ranks of other nodes: what they read and write travels over one connection a node, to the first node and from it.

The first node listens at `head_address:rpc_port`. Both sides prove that they know the key ($POTSTILL_API_KEY) before
anything else is read (HMAC, as `multiprocessing.connection` does it); what follows is neither encrypted nor signed, as
the ranks' own traffic is not: nodes belong on a network of their own. Messages are JSON, never pickles:

    node to head    {"node": 1, "model": ..., ...}     what it is, which must agree with the head
    head to node    {"settings": ...}                  its engines', or {"refused": why}
    both ways       [rank, line]                       of or to that rank's worker (`WorkerProcess`)
    node to head    [rank, null]                       it has ended in order
                    {"fault": why}                     a rank of it has not
                    {"leaving": why}                   it was told to stop, and waits for the end
"""

from __future__ import annotations

import contextlib
import json
import queue
import socket
import struct
import threading
import time
from collections.abc import Iterator
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, answer_challenge, deliver_challenge
from typing import Any

from distill.errors import EnvironmentFault, PotstillError, Preempted, UserInputError
from distill.recipe import SERVER_KEY_ENV
from teacher.backends.native.workers import WorkerProcess

# Until all nodes are there: a scheduler may start them minutes apart.
GATHER_S = 1800.0
RETRY_S = 1.0
# A node that was told to stop stays as long for the requests that are under way.
LEAVE_S = 90.0
HELLO_BYTES, HELLO_S = 2**16, 10
# A machine that is switched off closes no connection: after 10 s of silence it is asked, thrice, and what was sent must
# be confirmed within 25 s.
KEEP_ALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 25_000}


class Link:
    """A connection that any thread may send on. The other side's end is an EOFError here."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lock = threading.Lock()
        with self._socket() as of_it:
            of_it.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for name, value in KEEP_ALIVE.items():
                if (option := getattr(socket, name, None)) is not None:  # not every system has all of them
                    of_it.setsockopt(socket.IPPROTO_TCP, option, value)

    def wait_at_most(self, seconds: int) -> None:
        """Limit the wait for whatever is received from now on; 0: as long as it takes."""
        with self._socket() as of_it:
            of_it.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", seconds, 0))

    def send(self, message: Any) -> None:
        """Send, or drop what cannot be sent any more: `receive` says that the other side is gone."""
        with self._lock, contextlib.suppress(OSError):
            self._connection.send_bytes(json.dumps(message).encode())

    def receive(self, most: int | None = None) -> Any:
        try:
            return json.loads(self._connection.recv_bytes(most))
        except (OSError, ValueError) as exc:
            raise EOFError from exc

    def close(self) -> None:
        """End the connection for both sides, and for whoever is receiving now."""
        with contextlib.suppress(OSError), self._socket() as of_it:
            of_it.shutdown(socket.SHUT_RDWR)

    def _socket(self) -> socket.socket:
        return socket.fromfd(self._connection.fileno(), socket.AF_INET, socket.SOCK_STREAM)


class RemoteRank:
    """A `teacher.backends.native.live.Worker` on another node."""

    def __init__(self, node: Node, rank: int) -> None:
        self.rank = rank
        self._node = node
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def write(self, line: str) -> None:
        self._node.link.send([self.rank, line])

    def lines(self) -> Iterator[str]:
        return iter(self._lines.get, None)

    def put(self, line: str | None) -> None:
        self._lines.put(line)

    def check(self) -> None:
        if self._node.fault is not None:
            raise self._node.fault

    def kill(self) -> None:
        self._node.link.close()


class Node:
    """Another node as the first one sees it. `leaving`: it was told to stop; `fault`: what ended it."""

    def __init__(self, number: int, link: Link, ranks: range) -> None:
        self.link = link
        self.leaving: Preempted | None = None
        self.fault: EnvironmentFault | None = None
        self.ranks = [RemoteRank(self, rank) for rank in ranks]
        self._name = f"node {number}"
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        working = {rank.rank: rank for rank in self.ranks}
        with contextlib.suppress(EOFError):
            while working:
                match self.link.receive():
                    case {"fault": why}:
                        self.fault = EnvironmentFault(why, where=self._name)
                        break
                    case {"leaving": why}:
                        self.leaving = Preempted(why, where=self._name)
                    case [rank, None]:
                        working.pop(rank).put(None)
                    case [rank, line]:
                        working[rank].put(line)
        if working and self.fault is None:
            self.fault = EnvironmentFault("its connection has ended", where=self._name)
        for rank in working.values():
            rank.put(None)


def gathered(listener: socket.socket, hello: dict[str, Any], num_nodes: int, key: bytes) -> Iterator[tuple[int, Link]]:
    """The other nodes, as they come. One that differs from `hello`, this node's, is told so and may come again.

    Raises EnvironmentFault naming those that have not come within `GATHER_S`.
    """
    arrivals: queue.SimpleQueue[tuple[Link, Any]] = queue.SimpleQueue()

    def welcome(accepted: socket.socket) -> None:
        connection = Connection(accepted.detach())
        try:
            link = Link(connection)
            link.wait_at_most(HELLO_S)
            deliver_challenge(connection, key)
            answer_challenge(connection, key)
            hello = link.receive(HELLO_BYTES)
            link.wait_at_most(0)
            arrivals.put((link, hello))
        except (AuthenticationError, EOFError, OSError):
            connection.close()

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=welcome, args=(listener.accept()[0],), daemon=True).start()

    listener.listen()
    threading.Thread(target=accept, daemon=True).start()
    missing = set(range(1, num_nodes))
    until = time.monotonic() + GATHER_S
    while missing:
        try:
            link, theirs = arrivals.get(timeout=max(0.0, until - time.monotonic()))
        except queue.Empty:
            names = ", ".join(map(str, sorted(missing)))
            raise EnvironmentFault(f"these nodes have not come within {GATHER_S:.0f} s: {names}") from None
        if (why := _difference(hello, theirs, missing)) is not None:
            link.send({"refused": why})
            link.close()
            continue
        missing.remove(theirs["node"])
        yield theirs["node"], link


def _difference(hello: dict[str, Any], theirs: Any, missing: set[int]) -> str | None:
    if not isinstance(theirs, dict) or theirs.keys() != hello.keys():
        return "it speaks another version of potstill"
    for name, own in hello.items():
        if name != "node" and theirs[name] != own:
            return f"{name} is {theirs[name]!r} there and {own!r} at node 0"
    return None if theirs["node"] in missing else f"node {theirs['node']!r} is not awaited"


def join(address: str, port: int, hello: dict[str, Any], key: bytes) -> tuple[Link, dict[str, Any]]:
    """Tell the first node that this one is here; what it says. Tries for `GATHER_S`.

    Raises EnvironmentFault where it does not answer or does not know the key, UserInputError where this node differs.
    """
    where, until = f"{address}:{port}", time.monotonic() + GATHER_S
    while True:
        try:
            link = Link(Client((address, port), authkey=key))
            break
        except AuthenticationError as exc:
            raise EnvironmentFault(f"node 0 has another key in ${SERVER_KEY_ENV}", where=where) from exc
        except (OSError, EOFError) as exc:
            if time.monotonic() > until:
                raise EnvironmentFault(f"node 0 does not answer ({exc})", where=where) from exc
            time.sleep(RETRY_S)
    link.send(hello)
    try:
        answer = link.receive()
    except EOFError as exc:
        raise EnvironmentFault("node 0 has ended", where=where) from exc
    if "refused" in answer:
        raise UserInputError(f"node 0 does not take this node: {answer['refused']}", where=where)
    return link, answer["settings"]


class Relay:
    """This node's workers, by rank, for the first node; they end with it."""

    def __init__(self, link: Link, workers: dict[int, WorkerProcess]) -> None:
        self._link = link
        self._workers = workers
        self._working = set(workers)
        self._fault: PotstillError | None = None
        self._is_over = threading.Event()
        self._threads = [threading.Thread(target=self._read, args=(rank,), daemon=True) for rank in workers]
        self._threads.append(threading.Thread(target=self._obey, daemon=True))

    def run(self) -> None:
        """Until all workers have ended in order. Raises EnvironmentFault where one has not, or the first node is gone.

        A Preempted that a signal raises in it is told to the first node, which then ends all; a second one, or
        `LEAVE_S`, ends this.
        """
        for thread in self._threads:
            thread.start()
        try:
            self._is_over.wait()  # no thread's `join`: Python 3.11 takes one that a signal interrupts for ended
            fault, working = self._fault, list(self._working)
        except Preempted as exc:
            self._link.send({"leaving": str(exc)})
            self._is_over.wait(LEAVE_S)
            raise
        finally:
            for worker in self._workers.values():
                worker.kill()
            self._link.close()
            for thread in self._threads:
                thread.join()
        if fault is not None:
            raise fault
        if working:
            raise EnvironmentFault("node 0 has ended, or is not reached any more")

    def _obey(self) -> None:
        with contextlib.suppress(EOFError):
            while True:
                rank, line = self._link.receive()
                self._workers[rank].write(line)
        self._is_over.set()

    def _read(self, rank: int) -> None:
        worker = self._workers[rank]
        for line in worker.lines():
            self._link.send([rank, line])
        try:
            worker.check()
        except PotstillError as exc:
            self._fault = self._fault or exc
            self._link.send({"fault": str(exc)})
            self._link.close()
        else:
            self._working.discard(rank)
            self._link.send([rank, None])
            if not self._working:
                self._link.close()
