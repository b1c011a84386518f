"""One engine a core: small models generate in worker processes, each with one thread of arithmetic.

A decode step of a small model is hundreds of products of a few microseconds; threads inside one spend their time
waiting for each other (and come to a standstill where cores are shared), while processes do not meet at all. A worker
is this module run as a program: it reads one job from its standard input and writes each finished sequence as a line;
`live`, it reads sequences line by line for as long as they come. It ends by itself when its reader is gone. A live one
may also be a rank that shares a model's experts with others (`teacher.backends.ranks`).
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Generator, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from distill.errors import EnvironmentFault, PotstillError, UserInputError
from teacher.serve.sampler import SamplingParams
from teacher.serve.sequence import Sequence, ThinkingLimit
from teacher.serve.stopping import RepetitionLimit

if TYPE_CHECKING:
    from teacher.backends.ranks import Place
    from teacher.parallel.rebalance import Report
    from teacher.serve.detokenizer import Decode
    from teacher.serve.engine import Engine, Lockstep


@dataclass(frozen=True)
class EngineSettings:
    """The engine that a worker makes: a checkpoint folder, and how to run it.

    `tokenizer` is one of the tokenizers library, serialised; None: the engine gets no stop strings. `place`: it is a
    rank among others, in FP8.
    """

    folder: Path
    batch_size: int
    eos_token_ids: frozenset[int]
    speculate: bool = False
    batch_invariant: bool = False
    tokenizer: str | None = None
    place: Place | None = None

    def packed(self) -> dict[str, Any]:
        return asdict(self) | {"folder": str(self.folder.resolve()), "eos_token_ids": sorted(self.eos_token_ids)}


def generate_in_workers(
    engine: EngineSettings, sequences: list[Sequence[int]], *, num_workers: int
) -> Generator[Sequence[int], None, None]:
    """Yield the sequences, finished, in the order in which that happens. Raises EnvironmentFault if a worker dies.

    Abandoning the iterator ends the workers.
    """
    by_key = {sequence.key: sequence for sequence in sequences}
    settings = engine.packed()
    lines: queue.SimpleQueue[tuple[_Worker, str | None]] = queue.SimpleQueue()
    with contextlib.ExitStack() as stack:
        for number in range(num_workers):
            share = [packed(sequence) for sequence in sequences[number::num_workers]]
            stack.enter_context(_Worker(json.dumps(settings | {"sequences": share}), lines))
        running = num_workers
        while running:
            worker, line = lines.get()
            if line is None:
                worker.check()
                running -= 1
                continue
            key, *generated = json.loads(line)
            sequence = by_key.pop(key)
            take_generated(sequence, generated)
            yield sequence
    if by_key:
        raise EnvironmentFault(f"{len(by_key)} sequences did not come back", where="generation worker")


class _Worker:
    """A running worker; its lines go to `lines`, followed by None."""

    def __init__(self, job: str, lines: queue.SimpleQueue[tuple[_Worker, str | None]]) -> None:
        self._job = job
        self._lines = lines
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed in __exit__

    def __enter__(self) -> _Worker:
        self._process = _started(self._stderr)
        threading.Thread(target=self._pump, args=(self._process.stdin, self._process.stdout), daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.kill()
        self._process.wait()
        self._stderr.close()

    def check(self) -> None:
        """Raise EnvironmentFault unless the worker ended well."""
        _check(self._process, self._stderr)

    def _pump(self, stdin: IO[str], stdout: IO[str]) -> None:
        with contextlib.suppress(OSError):  # a worker that dies early closes its end: check() says so
            stdin.write(self._job)
            stdin.close()
        for line in stdout:
            self._lines.put((self, line))
        self._lines.put((self, None))


class LiveWorker:
    """A worker that stays: it takes sequences as they are sent and hands each back as soon as it is finished."""

    def __init__(self, settings: str) -> None:
        self._settings = settings
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed in __exit__

    def __enter__(self) -> LiveWorker:
        self._process = _started(self._stderr, "live")
        self.write(self._settings)
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.kill()
        self._process.wait()
        self._stderr.close()

    def write(self, line: str) -> None:
        """A sequence, `packed`, or `[key]` of one that is withdrawn; `[]`: it finishes what it has, and ends."""
        with contextlib.suppress(OSError):  # it has died: `lines` ends, and `check` says so
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()

    def lines(self) -> Iterator[str]:
        """Until the worker ends: of every finished sequence its key and what `take_generated` takes, as a list; after a
        step, what streamed sequences have written in it, as `{"grown": [[key, token_ids, logprobs], ...]}`; of a rank
        first `{"ready": ...}`, with its engine's `max_positions` and `precision`, and `{"rebalanced": ...}`, a
        `teacher.parallel.rebalance.Report`, of the first rank when experts have moved."""
        return iter(self._process.stdout)

    def check(self) -> None:
        """Raise EnvironmentFault unless the worker ended well, UserInputError where it says that of its model."""
        _check(self._process, self._stderr, UserInputError)

    def kill(self) -> None:
        self._process.kill()


def _started(stderr: IO[bytes], *arguments: str) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "teacher.backends.workers", *arguments]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": stderr}
    # A session of its own: a Ctrl-C at the terminal is for this process, which then lets its workers finish.
    return subprocess.Popen(command, env=environment, text=True, start_new_session=True, **pipes)


def _check(process: subprocess.Popen[str], stderr: IO[bytes], of_model: type[PotstillError] = EnvironmentFault) -> None:
    if status := process.wait():
        stderr.seek(0)
        last = stderr.read().decode(errors="replace").strip().rpartition("\n")[2]
        if status == UserInputError.exit_code and last:
            raise of_model(last, where="generation worker")
        why = last[-300:] if last and status != -signal.SIGKILL else "killed; is there enough memory?"
        message = f"ended with status {status}: {why}"
        raise EnvironmentFault(message, where="generation worker")


def take_generated(sequence: Sequence[int], generated: list[Any]) -> None:
    """Write into a sequence what a worker made of it."""
    sequence.generated_ids, sequence.finish_reason, sequence.logprobs, sequence.fault, *drafts = generated
    sequence.num_drafts, sequence.num_accepted = drafts


def packed(sequence: Sequence[int]) -> list[Any]:
    """What the caller has set of it; `_unpacked` makes it again."""
    limit, repetition = sequence.thinking, sequence.repetition
    settings = {
        "max_tokens": sequence.max_tokens,
        "seed": sequence.seed,
        "draw": asdict(sequence.sampling_params),
        "thinking": None if limit is None else asdict(limit),
        "stops": sequence.stops,
        "repetition": None if repetition is None else asdict(repetition),
        "streamed": sequence.streamed,
    }
    return [sequence.key, list(sequence.prompt_ids), settings]


def _unpacked(row: list[Any]) -> Sequence[int]:
    key, prompt_ids, settings = row
    draw, thinking, repetition = (settings.pop(name) for name in ("draw", "thinking", "repetition"))
    draw["logit_bias"] = tuple((token, value) for token, value in draw["logit_bias"])
    if thinking is not None:
        thinking = ThinkingLimit(**thinking | {"forced_ids": tuple(thinking["forced_ids"])})
    return Sequence(
        key,
        prompt_ids,
        sampling_params=SamplingParams(**draw),
        thinking=thinking,
        repetition=None if repetition is None else RepetitionLimit(**repetition),
        **settings,
    )


def _engine(settings: dict[str, Any]) -> Engine:
    import torch

    from teacher.serve.engine import Engine
    from teacher.serve.models import load_model

    torch.set_num_threads(1)
    speculate, invariant = settings["speculate"], settings["batch_invariant"]
    folder = Path(settings["folder"])
    model = load_model(folder, torch.device("cpu"), with_mtp=speculate, batch_invariant=invariant)
    limits = {"batch_size": settings["batch_size"], "eos_token_ids": settings["eos_token_ids"]}
    return Engine(model, **limits, speculate=speculate, decode=_decode(settings))


def _decode(settings: dict[str, Any]) -> Decode | None:
    from tokenizers import Tokenizer

    from teacher.serve.detokenizer import decode_by

    return decode_by(Tokenizer.from_str(settings["tokenizer"])) if settings["tokenizer"] else None


@contextlib.contextmanager
def _live_engine(
    settings: dict[str, Any], tell: Callable[[dict[str, Any]], object]
) -> Iterator[tuple[Engine, Lockstep | None]]:
    if settings["place"] is None:
        yield _engine(settings), None
        return
    import torch

    from teacher.backends.ranks import Place, engine_of_rank

    torch.set_num_threads(1)
    limits = {"batch_size": settings["batch_size"], "eos_token_ids": settings["eos_token_ids"]}
    place, folder = Place(**settings["place"]), Path(settings["folder"])

    def on_report(report: Report) -> None:
        tell({"rebalanced": report._asdict()})

    with engine_of_rank(folder, place, **limits, decode=_decode(settings), on_report=on_report) as opened:
        yield opened


def _write(done: Sequence[int], output: IO[str]) -> None:
    drafts = done.num_drafts, done.num_accepted
    row = [done.key, done.generated_ids, done.finish_reason, done.logprobs, done.fault, *drafts]
    output.write(json.dumps(row) + "\n")
    output.flush()


def _work(job: dict[str, Any], output: IO[str]) -> None:
    engine = _engine(job)
    for done in engine.run([_unpacked(row) for row in job["sequences"]]):
        _write(done, output)


def _work_live(lines: IO[str], output: IO[str]) -> None:
    """The first line holds the settings, the others are as `LiveWorker.write` says."""
    settings = json.loads(lines.readline())
    from teacher.serve.loop import Cancelled, EngineLoop, TokenDelta

    jobs: queue.SimpleQueue[Sequence[int] | Cancelled[int] | None] = queue.SimpleQueue()

    def read() -> None:
        for line in lines:
            if not (row := json.loads(line)):
                jobs.put(None)
                return
            jobs.put(Cancelled(row[0]) if len(row) == 1 else _unpacked(row))
        os._exit(1)  # who would read the answers is gone

    threading.Thread(target=read, daemon=True).start()

    def tell(news: dict[str, Any]) -> None:
        output.write(json.dumps(news) + "\n")
        output.flush()

    def grew(news: list[TokenDelta[int]]) -> None:
        tell({"grown": news})

    with _live_engine(settings, tell) as (engine, lockstep):
        if lockstep is not None:
            tell({"ready": {"max_positions": engine.max_positions, "precision": engine.precision}})
        EngineLoop(engine, jobs, lambda done: _write(done, output), grew, lockstep).run()


def _answers() -> IO[str]:
    """Standard output as it was. What libraries print there from now on, as NCCL does its log, goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


if __name__ == "__main__":
    output = _answers()
    try:
        if sys.argv[1:] == ["live"]:
            _work_live(sys.stdin, output)
        else:
            _work(json.load(sys.stdin), output)
    except PotstillError as exc:
        sys.stderr.write(f"{exc}\n")
        sys.exit(exc.exit_code)
    except (BrokenPipeError, KeyboardInterrupt):
        pass
    # Nothing is left to flush; skips the interpreter's complaint about a closed pipe.
    sys.stderr.close()
