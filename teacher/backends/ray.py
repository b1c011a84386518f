"""The Ray backend: one job over many replicas, each a vLLM server on its node or one endpoint of a pool.

Plain actors, not Ray Data: `map_batches` hands out a block's rows when the whole block is done and computes the block
again where a node dies, so finished samples would wait for the slowest answer of their block (hours, with 32k tokens)
and be paid for twice. Here a replica streams each sample back as it finishes, into the one ledger of the caller; what a
lost replica had not yet sent is asked again elsewhere. A replica that is lost is replaced up to `max_restarts` times,
as soon as a node has room for it.

The key travels as the argument of one call: not by the environment of Ray's processes, nor by a runtime environment,
both of which Ray writes to its logs.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import ceil
from pathlib import Path
from typing import Any

from distill.errors import EnvironmentFault, PotstillError
from distill.recipe import RayTeacher, VllmTeacher
from distill.records import Completion, Sampling, TeacherIdentity, TraceRequest
from teacher.backends.openai import OpenAICompatibleTeacher
from teacher.backends.vllm.backend import LOOPBACK, client_settings, located, open_vllm, vllm_identity
from teacher.backends.vllm.launch import installed_version, startup_timeout_s

# While one of a replica's streams waits for its last answers, another keeps the server busy.
STREAMS = 2
# Nodes may have to be provisioned first.
PROVISION_S = 900.0
POLL_S = 5.0
CLOSE_S = 30.0


def open_ray(config: RayTeacher, *, base_dir: Path, log_dir: Path | None = None) -> RayBackend:
    """Nothing is started yet. Raises EnvironmentFault where Ray (or, without `base_urls`, vLLM) is missing."""
    try:
        import ray  # noqa: F401
    except ImportError as exc:
        raise EnvironmentFault("is not installed: pip install 'potstill[ray]'", where="ray") from exc
    if config.base_urls:
        return RayBackend(config, identity=None, log_dir=log_dir or base_dir)
    version = installed_version()
    served = located(_server_config(config), base_dir)
    config = config.model_copy(update={"model": served.model, "revision": served.revision})
    return RayBackend(config, identity=vllm_identity(served, version), log_dir=log_dir or base_dir)


class RayBackend:
    """A `Teacher` over a cluster's replicas."""

    def __init__(self, config: RayTeacher, *, identity: TeacherIdentity | None, log_dir: Path) -> None:
        self.config = config
        self._given_identity = identity
        self._log_dir = log_dir
        self._key = os.environ.get(config.api_key_env)
        self._slots: list[_Slot] = []
        self._joined = False

    @cached_property
    def identity(self) -> TeacherIdentity:
        """The vLLM backend's where the servers are ours; a pool's is what its first endpoint says."""
        if self._given_identity is not None:
            return self._given_identity
        return _pool_member(self.config, self.config.base_urls[0], self._key).identity

    def generate(self, requests: Sequence[TraceRequest], sampling: Sampling) -> Iterator[Completion]:
        """Yield completions as they finish anywhere. Raises EnvironmentFault where no replica is left."""
        if requests:
            self._join()
            yield from _GenerateCall(self._slots, requests, sampling, self.config).run()

    def close(self) -> None:
        """End the replicas and their servers; the cluster too if it was started here."""
        if self._joined:
            import ray

            for slot in self._slots:
                slot.end()
            ray.shutdown()
            self._joined = False

    def _join(self) -> None:
        if self._joined:
            return
        import ray

        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        local: dict[str, Any] = {"include_dashboard": False, "_node_ip_address": LOOPBACK}
        with _without(self.config.api_key_env):
            ray.init(
                address=self.config.address or "local",
                log_to_driver=False,
                logging_level="ERROR",
                **({} if self.config.address else local),
            )
        self._joined = True
        urls = self.config.base_urls or (None,) * self.config.num_replicas
        expected = self.identity
        self._slots = [
            _Slot(number, url, self.config, expected, Secret(self._key), self._log_dir)
            for number, url in enumerate(urls)
        ]


class Secret:
    """A key that can be sent but not shown."""

    def __init__(self, value: str | None) -> None:
        self.value = value

    def __repr__(self) -> str:
        return "Secret(***)"


class Replica:
    """The inside of an actor: a teacher of its own. Faults come back as values, without their tracebacks."""

    def __init__(self, config: RayTeacher, base_url: str | None, log_dir: str) -> None:
        self._config = config
        self._base_url = base_url
        self._log_dir = Path(log_dir)
        self._key: str | None = None
        self._server: Any = None

    def open(self, key: Secret) -> TeacherIdentity | PotstillError:
        """Bring the server up, or reach the endpoint."""
        self._key = key.value
        try:
            if self._base_url is not None:
                return _pool_member(self._config, self._base_url, self._key).identity
            if self._key:  # the server takes its key from its starter's environment, under this name
                os.environ[self._config.api_key_env] = self._key
            self._server = open_vllm(_server_config(self._config), base_dir=Path(), log_dir=self._log_dir)
            assert self._server.url
            identity: TeacherIdentity = self._server.identity
            return identity
        except PotstillError as exc:
            return exc

    def generate(self, requests: list[TraceRequest], sampling: Sampling) -> Iterator[Completion | PotstillError]:
        """Yield completions as they finish; a fault is the last that comes."""
        try:
            if self._server is not None:
                yield from self._server.generate(requests, sampling)
            else:
                assert self._base_url is not None
                yield from _pool_member(self._config, self._base_url, self._key).generate(requests, sampling)
        except PotstillError as exc:
            yield exc

    def close(self) -> None:
        if self._server is not None:
            self._server.close()


@dataclass
class _Slot:
    """A place for a replica: the actor that fills it now, and how often it may be filled again."""

    number: int
    base_url: str | None
    config: RayTeacher
    expected: TeacherIdentity
    key: Secret
    log_dir: Path
    actor: Any = None
    opening: Any = None
    since: float = 0.0
    ready: bool = False
    fillings: int = 0
    fault: EnvironmentFault | None = None

    @property
    def given_up(self) -> bool:
        return self.actor is None and self.fillings > self.config.max_restarts

    def fill(self) -> None:
        """Ask Ray for an actor; it comes when a node has room for it."""
        import ray

        own = self.base_url is None
        resources = {"num_cpus": self.config.cpus_per_replica, "num_gpus": self.config.gpus_per_replica}
        options = {"max_concurrency": STREAMS + 2, "scheduling_strategy": "SPREAD"}
        actor_class = ray.remote(Replica).options(**options, **(resources if own else {"num_cpus": 0}))
        log_dir = self.log_dir / f"replica-{self.number}"
        self.actor = actor_class.remote(self.config, self.base_url, str(log_dir))
        self.opening = self.actor.open.remote(self.key)
        self.since = time.monotonic()
        self.ready = False
        self.fillings += 1

    def opened(self) -> None:
        """Take what `open` returned. Raises PotstillError for what no other replica would do better."""
        import ray

        answer = ray.get(self.opening)
        self.opening = None
        if isinstance(answer, EnvironmentFault):
            self.lose(answer)
        elif isinstance(answer, PotstillError):
            raise answer
        elif answer != self.expected:
            message = f"another teacher than expected: {_difference(answer, self.expected)}"
            raise EnvironmentFault(message, where=self.base_url or f"replica {self.number}")
        else:
            self.ready = True

    def lose(self, fault: EnvironmentFault) -> None:
        self.fault = fault
        self.end(kindly=False)

    def end(self, *, kindly: bool = True) -> None:
        import ray

        actor, self.actor, self.opening, self.ready = self.actor, None, None, False
        if actor is None:
            return
        if kindly:
            with contextlib.suppress(ray.exceptions.RayError):
                ray.get(actor.close.remote(), timeout=CLOSE_S)
        ray.kill(actor)  # the keeper ends its server


@dataclass
class _Stream:
    """Requests under way at one replica, and the generator that brings them."""

    slot: _Slot
    actor: Any
    waiting: dict[tuple[str, int], TraceRequest]
    generator: Any = field(repr=False)


class _GenerateCall:
    """One call of `generate`."""

    def __init__(
        self, slots: list[_Slot], requests: Sequence[TraceRequest], sampling: Sampling, config: RayTeacher
    ) -> None:
        self._slots = slots
        self._sampling = sampling
        self._waiting = deque({_name(request): request for request in requests}.values())
        share = ceil(len(self._waiting) / (len(slots) * STREAMS))
        self._chunk = max(1, min(config.max_concurrency, share))
        self._patience_s = startup_timeout_s(config, config.model) + PROVISION_S
        self._streams: list[_Stream] = []
        self._fault: PotstillError | None = None

    def run(self) -> Iterator[Completion]:
        import ray

        while (self._waiting and self._fault is None) or self._streams:
            if self._fault is None:
                self._fill_slots()
                self._start_streams()
            pending = [slot.opening for slot in self._slots if slot.opening is not None]
            sources = [*(stream.generator for stream in self._streams), *pending]
            ready, _ = ray.wait(sources, num_returns=1, timeout=POLL_S, fetch_local=False)
            for stream in [stream for stream in self._streams if stream.generator in ready]:
                completion = self._take(stream)
                if completion is not None:
                    yield completion
            for slot in [slot for slot in self._slots if slot.opening is not None and slot.opening in ready]:
                self._open(slot)
        if self._fault is not None:
            raise self._fault

    def _fill_slots(self) -> None:
        """Replace what was lost, give up what does not come; where no slot is left, that is the fault."""
        for slot in self._slots:
            if slot.opening is not None and time.monotonic() - slot.since > self._patience_s:
                resources = f"{slot.config.cpus_per_replica:g} CPUs, {slot.config.gpus_per_replica:g} GPUs"
                message = f"was not up after {self._patience_s:.0f} s; does a node have room for it ({resources})?"
                slot.lose(EnvironmentFault(message, where=f"replica {slot.number}"))
            if slot.actor is None and not slot.given_up:
                slot.fill()
        if all(slot.given_up for slot in self._slots):
            self._fault = next(slot.fault for slot in reversed(self._slots) if slot.fault is not None)

    def _start_streams(self) -> None:
        for slot in self._slots:
            while slot.ready and self._waiting and sum(stream.slot is slot for stream in self._streams) < STREAMS:
                chunk = [self._waiting.popleft() for _ in range(min(self._chunk, len(self._waiting)))]
                generator = slot.actor.generate.options(num_returns="streaming").remote(chunk, self._sampling)
                waiting = {_name(request): request for request in chunk}
                self._streams.append(_Stream(slot, slot.actor, waiting, generator))

    def _open(self, slot: _Slot) -> None:
        import ray

        try:
            slot.opened()
        except ray.exceptions.RayError as exc:
            slot.lose(_lost(slot, exc))
        except PotstillError as exc:
            self._fault = self._fault or exc

    def _take(self, stream: _Stream) -> Completion | None:
        """The next of a stream's completions; None where it has ended, well or not."""
        import ray

        try:
            answer = ray.get(next(stream.generator))
        except StopIteration:
            self._end(stream)
            return None
        except ray.exceptions.RayError as exc:
            self._end(stream, _lost(stream.slot, exc))
            return None
        if isinstance(answer, EnvironmentFault):
            self._end(stream, answer)
        elif isinstance(answer, PotstillError):
            self._fault = self._fault or answer
            self._end(stream)
        elif stream.waiting.pop(_name(answer.request), None) is not None:
            completion: Completion = answer
            return completion
        return None

    def _end(self, stream: _Stream, fault: EnvironmentFault | None = None) -> None:
        """Put back what the stream still owed; with a fault its replica is lost (unless it is another by now)."""
        self._streams.remove(stream)
        self._waiting.extendleft(reversed(stream.waiting.values()))
        if fault is not None and stream.slot.actor is stream.actor:
            stream.slot.lose(fault)


def _name(request: TraceRequest) -> tuple[str, int]:
    return request.problem.id, request.sample_index


def _server_config(config: RayTeacher) -> VllmTeacher:
    shared = {name: getattr(config, name) for name in VllmTeacher.model_fields if hasattr(config, name)}
    return VllmTeacher.model_validate(shared | {"backend": "vllm"})


def _pool_member(config: RayTeacher, base_url: str, key: str | None) -> OpenAICompatibleTeacher:
    return OpenAICompatibleTeacher(client_settings(config, base_url, config.model), api_key=key)


def _lost(slot: _Slot, exc: Exception) -> EnvironmentFault:
    said = str(exc).strip().partition("\n")[0]
    return EnvironmentFault(f"was lost ({type(exc).__name__}: {said[:160]})", where=f"replica {slot.number}")


def _difference(one: TeacherIdentity, other: TeacherIdentity) -> str:
    pairs = zip(one.model_dump().items(), other.model_dump().values(), strict=True)
    return ", ".join(f"{name} {value!r} instead of {wanted!r}" for (name, value), wanted in pairs if value != wanted)


@contextlib.contextmanager
def _without(variable: str) -> Iterator[None]:
    """Inside the block this process has no such variable: Ray's processes inherit what is there when they start."""
    value = os.environ.pop(variable, None)
    try:
        yield
    finally:
        if value is not None:
            os.environ[variable] = value
