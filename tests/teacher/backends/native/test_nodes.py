"""Ranks of another node over real sockets: lines travel, strangers do not get in, whoever is lost is named."""

from __future__ import annotations

import json
import queue
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Client
from typing import Any

import pytest

from distill.errors import EnvironmentFault, Preempted, UserInputError
from teacher.backends.native import nodes
from teacher.backends.native.nodes import Link, Node, Relay, gathered, join

KEY = b"a key"


class Echo:
    """Stands where a rank's process does: says what it is told, until `[]`, or until it is told to break."""

    def __init__(self) -> None:
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self.fault: EnvironmentFault | None = None

    def write(self, line: str) -> None:
        if line == "break":
            self.fault = EnvironmentFault("ended with status -9: killed", where="generation worker")
        self._lines.put(None if line in ("[]", "break") else f"{line}!")

    def lines(self) -> Iterator[str]:
        return iter(self._lines.get, None)

    def check(self) -> None:
        if self.fault is not None:
            raise self.fault

    def kill(self) -> None:
        self._lines.put(None)


def hello(node: int, **changes: Any) -> dict[str, Any]:
    return {"node": node, "potstill": "1", "model": "abc", "num_ranks": 4, "num_nodes": 2, **changes}


@contextmanager
def listening() -> Iterator[tuple[socket.socket, int]]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener, listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)


class Joined:
    """What `join` gave in a thread of its own."""

    def __init__(self, port: int, mine: dict[str, Any], key: bytes = KEY) -> None:
        self._thread = threading.Thread(target=self._join, args=(port, mine, key), daemon=True)
        self._thread.start()

    def _join(self, port: int, mine: dict[str, Any], key: bytes) -> None:
        try:
            self.result: Any = join("127.0.0.1", port, mine, key)
        except Exception as exc:  # noqa: BLE001 - for the test
            self.result = exc

    def get(self) -> Any:
        self._thread.join(30)
        assert not self._thread.is_alive()
        return self.result


@contextmanager
def one_node(num_ranks: int = 2) -> Iterator[tuple[Node, Relay]]:
    """Node 1 as node 0 sees it, and what stands on it."""
    with listening() as (listener, port):
        joined = Joined(port, hello(1))
        ((number, link),) = gathered(listener, hello(0), 2, KEY)
        link.send({"settings": {"batch_size": 3}})
        node_link, settings = joined.get()
    assert (number, settings) == (1, {"batch_size": 3})
    ranks = range(2, 2 + num_ranks)
    yield Node(1, link, ranks), Relay(node_link, {rank: Echo() for rank in ranks})  # type: ignore[arg-type]
    link.close()
    node_link.close()


def in_thread(relay: Relay) -> queue.SimpleQueue[Exception | None]:
    ended: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()

    def run() -> None:
        try:
            relay.run()
        except Exception as exc:  # noqa: BLE001 - for the test
            ended.put(exc)
        else:
            ended.put(None)

    threading.Thread(target=run, daemon=True).start()
    return ended


def test_lines_travel_both_ways_and_the_end_is_in_order() -> None:
    with one_node() as (node, relay):
        ended = in_thread(relay)
        for turn in range(300):
            for rank in node.ranks:
                rank.write(f"{rank.rank} {turn}")
        for rank in node.ranks:
            rank.write("[]")
        for rank in node.ranks:
            assert list(rank.lines()) == [f"{rank.rank} {turn}!" for turn in range(300)]
            rank.check()
        assert ended.get(timeout=30) is None


def test_a_rank_that_is_lost_is_named_at_both_ends() -> None:
    with one_node() as (node, relay):
        ended = in_thread(relay)
        node.ranks[1].write("break")
        for rank in node.ranks:
            assert list(rank.lines()) == []
            with pytest.raises(EnvironmentFault, match=r"^node 1: generation worker: ended with status -9"):
                rank.check()
        assert "ended with status -9" in str(ended.get(timeout=30))


def test_a_node_that_vanishes_is_named() -> None:
    with one_node() as (node, relay):
        in_thread(relay)
        relay._link.close()
        assert list(node.ranks[0].lines()) == []
        with pytest.raises(EnvironmentFault, match=r"^node 1: its connection has ended"):
            node.ranks[0].check()


def test_a_first_node_that_vanishes_ends_the_others() -> None:
    with one_node() as (node, relay):
        ended = in_thread(relay)
        node.ranks[0].kill()
        assert isinstance(problem := ended.get(timeout=30), EnvironmentFault)
        assert "node 0 has ended" in str(problem)


@pytest.fixture
def stopped_soon() -> Iterator[None]:
    """A signal comes while the main thread waits."""

    def stop(*_: object) -> None:
        raise Preempted("stopped by SIGTERM")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def wait_for_leaving(node: Node) -> None:
    until = time.monotonic() + 20
    while node.leaving is None:
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_node_that_is_told_to_stop_tells_and_waits_for_the_end(stopped_soon: None) -> None:
    with one_node(num_ranks=1) as (node, relay):
        (rank,) = node.ranks

        def end() -> None:
            wait_for_leaving(node)
            rank.write("one more")
            rank.write("[]")

        threading.Thread(target=end, daemon=True).start()
        with pytest.raises(Preempted, match="SIGTERM"):
            relay.run()
        assert list(rank.lines()) == ["one more!"]
        assert str(node.leaving) == "node 1: stopped by SIGTERM"
        rank.check()


def test_a_node_that_is_told_to_stop_does_not_wait_for_ever(
    stopped_soon: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nodes, "LEAVE_S", 0.2)
    with one_node() as (node, relay):
        with pytest.raises(Preempted, match="SIGTERM"):
            relay.run()
        wait_for_leaving(node)


@pytest.mark.parametrize(
    ("theirs", "said"),
    [
        (hello(1, model="xyz"), "model is 'xyz' there and 'abc' at node 0"),
        (hello(1, num_ranks=8), "num_ranks is 8 there and 4 at node 0"),
        (hello(2), "node 2 is not awaited"),
        ({"node": 1}, "another version of potstill"),
        ([1], "another version of potstill"),
    ],
    ids=str,
)
def test_a_node_that_differs_is_told_so_and_the_right_one_is_taken(theirs: Any, said: str) -> None:
    with listening() as (listener, port):
        arrivals = gathered(listener, hello(0), 2, KEY)
        wrong = Joined(port, theirs)
        first: queue.SimpleQueue[Any] = queue.SimpleQueue()
        threading.Thread(target=lambda: first.put(next(arrivals)), daemon=True).start()
        problem = wrong.get()
        assert isinstance(problem, UserInputError)
        assert said in str(problem)
        right = Joined(port, hello(1))
        number, link = first.get(timeout=30)
        link.send({"settings": {}})
        assert number == 1
        assert isinstance(right.get()[0], Link)


def test_strangers_do_not_get_in_and_keep_nobody_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "HELLO_S", 1)
    with listening() as (listener, port):
        first: queue.SimpleQueue[Any] = queue.SimpleQueue()
        threading.Thread(target=lambda: first.put(next(gathered(listener, hello(0), 2, KEY))), daemon=True).start()
        silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(50)]
        with socket.create_connection(("127.0.0.1", port)) as loud:
            loud.sendall(b"\xff" * 100_000)
            problem = Joined(port, hello(1), key=b"another key").get()
            assert isinstance(problem, EnvironmentFault)
            assert "node 0 has another key in $POTSTILL_API_KEY" in str(problem)
            right = Joined(port, hello(1))
            number, link = first.get(timeout=30)
            link.send({"settings": {}})
            assert number == 1
            assert right.get()[1] == {}
        for connection in silent:  # nobody waits for them for ever
            connection.settimeout(20)
            while connection.recv(1000):
                pass
            connection.close()


def test_a_hello_without_end_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    with listening() as (listener, port):
        monkeypatch.setattr(nodes, "GATHER_S", 3.0)
        arrivals = gathered(listener, hello(0), 3, KEY)

        def shout() -> None:
            with Client(("127.0.0.1", port), authkey=KEY) as connection:
                connection.send_bytes(json.dumps(hello(1) | {"model": "x" * 100_000}).encode())

        threading.Thread(target=shout, daemon=True).start()
        with pytest.raises(EnvironmentFault, match="these nodes have not come within 3 s: 1, 2"):
            next(arrivals)


def test_a_first_node_that_never_answers_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "GATHER_S", 0.5)
    monkeypatch.setattr(nodes, "RETRY_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(EnvironmentFault, match=f"^127.0.0.1:{port}: node 0 does not answer"):
        join("127.0.0.1", port, hello(1), KEY)
