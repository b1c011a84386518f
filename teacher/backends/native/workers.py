"""One engine a core: small models generate in worker processes, each with one thread of arithmetic.

A decode step of a small model is hundreds of products of a few microseconds; threads inside one spend their time
waiting for each other (and come to a standstill where cores are shared), while processes do not meet at all. A worker
is this module run as a program: it reads sequences from its standard input, line by line for as long as they come, and
writes each finished one as a line. It ends by itself when its reader is gone. It may also be a rank that shares a
model's experts with others (`teacher.backends.native.ranks`).
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
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from distill.errors import EnvironmentFault, PotstillError, UserInputError
from teacher.engine.guide import Grammar, Guides
from teacher.engine.sampler import SamplingParams
from teacher.engine.sequence import Sequence, ThinkingLimit
from teacher.engine.stopping import RepetitionLimit

if TYPE_CHECKING:
    from teacher.backends.native.ranks import RankPlace
    from teacher.engine.detokenizer import Decode
    from teacher.engine.engine import Engine, Lockstep
    from teacher.parallel.placement.rebalance import Report


@dataclass(frozen=True)
class EngineSettings:
    """The engine that a worker makes: a checkpoint folder, and how to run it.

    `tokenizer` is one of the tokenizers library, serialised; None: the engine gets no stop strings and no grammars.
    `place`: it is a
    rank among others, in FP8.
    """

    folder: Path
    batch_size: int
    eos_token_ids: frozenset[int]
    speculate: bool = False
    batch_invariant: bool = False
    dtype: str | None = None
    tokenizer: str | None = None
    place: RankPlace | None = None

    def packed(self) -> dict[str, Any]:
        return asdict(self) | {"folder": str(self.folder.resolve()), "eos_token_ids": sorted(self.eos_token_ids)}


class WorkerProcess:
    """A process with an engine of its own. It takes sequences as they are sent and hands each back once it is finished.

    `model_fault` is the kind of fault that a model which the worker cannot read is: EnvironmentFault where this process
    has read it before, so that the files must have changed since.
    """

    def __init__(self, settings: str, model_fault: type[PotstillError] = EnvironmentFault) -> None:
        self._settings = settings
        self._model_fault = model_fault
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed in __exit__

    def __enter__(self) -> WorkerProcess:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, "-m", f"{__package__}.workers"]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._stderr}
        # A session of its own: a Ctrl-C at the terminal is for this process, which then lets its workers finish.
        self._process = subprocess.Popen(command, env=environment, text=True, start_new_session=True, **pipes)
        self.write(self._settings)
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.kill()
        self._process.wait()
        self._stderr.close()

    def write(self, line: str) -> None:
        """Send a line of `begin_line`, `cancel_line` or `END_LINE`."""
        with contextlib.suppress(OSError):  # it has died: `lines` ends, and `check` says so
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()

    def lines(self) -> Iterator[str]:
        """Read until the worker ends: of every finished sequence its key and what `take_generated` takes, as a list;
        after a step, what streamed sequences have written in it, as `{"deltas": [[key, token_ids, logprobs], ...]}`;
        `{"counts": ...}`, its `EngineCounts`, every `COUNTS_EVERY_S`; of a rank first `{"ready": ...}`, with its
        engine's `max_positions` and `precision`, and `{"rebalanced": ...}`, a
        `teacher.parallel.placement.rebalance.Report`, of the first rank when experts have moved."""
        return iter(self._process.stdout)

    def check(self) -> None:
        """Raise EnvironmentFault unless the worker ended well, `model_fault` where it says that of its model."""
        if status := self._process.wait():
            self._stderr.seek(0)
            last = self._stderr.read().decode(errors="replace").strip().rpartition("\n")[2]
            if status == UserInputError.exit_code and last:
                raise self._model_fault(last, where="generation worker")
            why = last[-300:] if last and status != -signal.SIGKILL else "killed; is there enough memory?"
            message = f"ended with status {status}: {why}"
            raise EnvironmentFault(message, where="generation worker")

    def kill(self) -> None:
        self._process.kill()


# How often a worker says how its work stands.
COUNTS_EVERY_S = 1.0
# A worker finishes what it has, and ends.
END_LINE = "[]"


def begin_line(sequences: Iterable[tuple[int, Sequence[int]]]) -> str:
    """Sequences to begin, each with the key that it has in the worker. They join the engine together: a batch does not
    depend on when each was read."""
    return json.dumps({"begin": [[key, *packed(sequence)] for key, sequence in sequences]})


def cancel_line(keys: Iterable[int]) -> str:
    """Sequences that nobody wants any more."""
    return json.dumps({"cancel": list(keys)})


def take_generated(sequence: Sequence[int], generated: list[Any]) -> None:
    """Write into a sequence what a worker made of it."""
    sequence.generated_ids, sequence.finish_reason, sequence.logprobs, sequence.fault, *others = generated
    sequence.num_drafts, sequence.num_accepted, sequence.prompt_logprobs = others


def packed(sequence: Sequence[int]) -> list[Any]:
    """Pack what the caller has set of it but its key; `_unpacked` makes it again."""
    limit, repetition, grammar = sequence.thinking, sequence.repetition, sequence.grammar
    settings = {
        "max_tokens": sequence.max_tokens,
        "seed": sequence.seed,
        "draw": asdict(sequence.sampling_params),
        "thinking": None if limit is None else asdict(limit),
        "stops": sequence.stops,
        "repetition": None if repetition is None else asdict(repetition),
        "grammar": None if grammar is None else asdict(grammar),
        "streamed": sequence.streamed,
        "scored_from": sequence.scored_from,
        "first_ids": list(sequence.first_ids),
    }
    return [list(sequence.prompt_ids), settings]


def _unpacked(row: list[Any], guides: Guides | None) -> Sequence[int]:
    key, prompt_ids, settings = row
    kinds = ("draw", "thinking", "repetition", "grammar")
    draw, thinking, repetition, grammar = (settings.pop(name) for name in kinds)
    draw["logit_bias"] = tuple((token, value) for token, value in draw["logit_bias"])
    if thinking is not None:
        thinking = ThinkingLimit(**thinking | {"forced_ids": tuple(thinking["forced_ids"])})
    if grammar is not None:
        grammar = Grammar(**grammar | {"tags": tuple(grammar["tags"])})
    return Sequence(
        key,
        prompt_ids,
        sampling_params=SamplingParams(**draw),
        thinking=thinking,
        repetition=None if repetition is None else RepetitionLimit(**repetition),
        grammar=grammar,
        guide=None if grammar is None or guides is None else guides.guide(grammar),
        **settings,
    )


def _engine(settings: dict[str, Any]) -> Engine:
    import torch

    from teacher.engine.engine import Engine
    from teacher.models.load import load_model

    torch.set_num_threads(1)
    speculate, invariant = settings["speculate"], settings["batch_invariant"]
    folder = Path(settings["folder"])
    dtype = None if settings["dtype"] is None else getattr(torch, settings["dtype"])
    model = load_model(folder, torch.device("cpu"), with_mtp=speculate, batch_invariant=invariant, dtype=dtype)
    limits = {"batch_size": settings["batch_size"], "eos_token_ids": settings["eos_token_ids"]}
    return Engine(model, **limits, speculate=speculate, decode=_decode(settings))


def _decode(settings: dict[str, Any]) -> Decode | None:
    from tokenizers import Tokenizer

    from teacher.engine.detokenizer import decode_by

    return decode_by(Tokenizer.from_str(settings["tokenizer"])) if settings["tokenizer"] else None


def _guides(settings: dict[str, Any]) -> Guides | None:
    from tokenizers import Tokenizer

    tokenizer = settings["tokenizer"]
    return Guides(Tokenizer.from_str(tokenizer), settings["eos_token_ids"]) if tokenizer else None


@contextlib.contextmanager
def _opened_engine(
    settings: dict[str, Any], tell: Callable[[dict[str, Any]], object]
) -> Iterator[tuple[Engine, Lockstep | None]]:
    if settings["place"] is None:
        yield _engine(settings), None
        return
    import torch

    from teacher.backends.native.ranks import RankPlace, engine_of_rank

    torch.set_num_threads(1)
    limits = {"batch_size": settings["batch_size"], "eos_token_ids": settings["eos_token_ids"]}
    place, folder = RankPlace(**settings["place"]), Path(settings["folder"])

    def on_report(report: Report) -> None:
        tell({"rebalanced": report._asdict()})

    with engine_of_rank(folder, place, **limits, decode=_decode(settings), on_report=on_report) as opened:
        yield opened


def _write(done: Sequence[int], output: IO[str]) -> None:
    others = done.num_drafts, done.num_accepted, done.prompt_logprobs
    row = [done.key, done.generated_ids, done.finish_reason, done.logprobs, done.fault, *others]
    output.write(json.dumps(row) + "\n")
    output.flush()


def _work(lines: IO[str], output: IO[str]) -> None:
    """Run the engine that the first line sets for as long as the others, as `WorkerProcess.write` sends them, come."""
    settings = json.loads(lines.readline())
    from teacher.engine.loop import Cancelled, EngineJob, EngineLoop, TokenDelta

    jobs: queue.SimpleQueue[EngineJob[int] | None] = queue.SimpleQueue()
    guides = _guides(settings)

    def read() -> None:
        for line in lines:
            match json.loads(line):
                case {"begin": rows}:
                    jobs.put([_unpacked(row, guides) for row in rows])
                case {"cancel": keys}:
                    for key in keys:
                        jobs.put(Cancelled(key))
                case _:
                    jobs.put(None)
                    return
        os._exit(1)  # who would read the answers is gone

    threading.Thread(target=read, daemon=True).start()

    def send(news: dict[str, Any]) -> None:
        output.write(json.dumps(news) + "\n")
        output.flush()

    def on_deltas(deltas: list[TokenDelta[int]]) -> None:
        send({"deltas": deltas})

    told = time.monotonic()

    def on_step() -> None:
        nonlocal told
        if time.monotonic() - told >= COUNTS_EVERY_S:
            told = time.monotonic()
            send({"counts": engine.counts})

    with _opened_engine(settings, send) as (engine, lockstep):
        if lockstep is not None:
            send({"ready": {"max_positions": engine.max_positions, "precision": engine.precision}})
        EngineLoop(engine, jobs, lambda done: _write(done, output), on_deltas, lockstep, on_step).run()


def _answers() -> IO[str]:
    """Standard output as it was. What libraries print there from now on, as NCCL does its log, goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever the parent does with it
    output = _answers()
    try:
        _work(sys.stdin, output)
    except PotstillError as exc:
        sys.stderr.write(f"{exc}\n")
        sys.exit(exc.exit_code)
    except (BrokenPipeError, KeyboardInterrupt):
        pass
    # Every answer was flushed; to take the interpreter apart, with torch in it, would cost who waits a second.
    os._exit(0)
