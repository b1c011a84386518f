"""Renders chat templates: `python -I -S worker.py CLOCK_PER_CPU MEMORY_BYTES IMPORT_FOLDER...`

Standard input brings requests of three frames (a length of eight bytes, then JSON): the template and its limits, the
variables that all conversations share, the conversations. Standard output takes one frame an answer. Its end of input
is its end.

The environment is that of transformers' `apply_chat_template` to the letter (`transformers/utils/chat_template_utils`),
so that a template gives the same text here. A request's processor time is the kernel's to limit: its signal ends this
process in the middle of whatever it does, a loop inside of C included, and nobody has to watch.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    from jinja2 import Environment, Template

LENGTH_BYTES = 8
MAX_FAULT_CHARACTERS = 500


def main() -> None:
    clock_per_cpu, memory_bytes = float(sys.argv[1]), int(sys.argv[2])
    sys.path += sys.argv[3:]
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1):
        os.dup2(nothing, descriptor)
    for number in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    environment = chat_environment()
    _confine(memory_bytes)
    templates: dict[str, Template] = {}
    while (head := _read(requests)) is not None:
        settings, conversations = _read(requests), _read(requests)
        signal.setitimer(signal.ITIMER_PROF, head["cpu_s"])
        signal.setitimer(signal.ITIMER_REAL, clock_per_cpu * head["cpu_s"])
        answer = _answer(environment, templates, head, settings, conversations).encode()
        for timer in (signal.ITIMER_PROF, signal.ITIMER_REAL):
            signal.setitimer(timer, 0)
        answers.write(len(answer).to_bytes(LENGTH_BYTES, "big") + answer)
        answers.flush()


def chat_environment() -> Environment:
    """Jinja as chat templates expect it."""
    from jinja2 import nodes
    from jinja2.exceptions import TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}`: marks what the assistant wrote, for training; the text is what is inside."""

        tags = {"generation"}  # noqa: RUF012  jinja2's

        def parse(self, parser: Any) -> nodes.Node:
            lineno = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return nodes.CallBlock(self.call_method("_inside"), [], [], body).set_lineno(lineno)

        def _inside(self, caller: Any) -> str:
            return str(caller())

    def raise_exception(message: Any) -> None:
        raise TemplateError(message)

    def tojson(x: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:  # type: ignore[no-untyped-def]
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _answer(
    environment: Environment, templates: dict[str, Template], head: Any, settings: Any, conversations: Any
) -> str:
    """JSON: the texts, or the first fault."""
    from jinja2.exceptions import TemplateError

    try:
        template = templates.get(head["template"])
        if template is None:
            template = templates[head["template"]] = environment.from_string(head["source"])
        left = head["max_characters"]
        texts = []
        for messages in conversations:
            texts.append(_text(template, {**settings, "messages": messages}, left))
            left -= len(texts[-1])
        return json.dumps({"texts": texts})
    except _TooLong:
        return _fault(f"writes more than {head['max_characters']} characters")
    except MemoryError:
        return _fault("takes more memory than a conversation may")
    except RecursionError:
        return _fault("recurses without end")
    except Exception as exc:  # noqa: BLE001  a template is a program of somebody else's: anything may come out of it
        refused = type(exc) is TemplateError  # what `raise_exception` raises; jinja's own are subclasses of it
        return _fault(str(exc) if refused else f"cannot be rendered ({type(exc).__name__}: {exc})", refused=refused)


class _TooLong(Exception):
    pass


def _text(template: Template, variables: dict[str, Any], max_characters: int) -> str:
    pieces = []
    for piece in template.generate(variables):
        max_characters -= len(piece)
        if max_characters < 0:
            raise _TooLong
        pieces.append(piece)
    return "".join(pieces)


def _fault(message: str, *, refused: bool = False) -> str:
    return json.dumps({"fault": message[:MAX_FAULT_CHARACTERS], "refused": refused})


def _confine(memory_bytes: int) -> None:
    """No more memory than `memory_bytes` beside what Jinja took, no files, no processes, no core."""
    born_with = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    for what, amount in (
        (resource.RLIMIT_AS, born_with + memory_bytes),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(what, (amount, amount))


def _read(file: BinaryIO) -> Any:
    length = file.read(LENGTH_BYTES)
    if len(length) < LENGTH_BYTES:
        return None
    return json.loads(file.read(int.from_bytes(length, "big")))


if __name__ == "__main__":
    main()
