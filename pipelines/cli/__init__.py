"""The command line, and the only room that prints: one module a concern, put together here.

    potstill init [FOLDER]     potstill --version
    potstill run|generate|distill|eval|compare RECIPE [--set a.b=value] [--out runs]
    potstill compare RUN RUN... [--report FOLDER]     potstill regrade RUN_OR_RECIPE
    potstill reproduce NAME [--set a.b=value]
    potstill push|push-traces|serve RECIPE [--dry-run]     potstill doctor [RECIPE]     potstill zoo list|show
    potstill pretrain RECIPE (under torchrun)     potstill launch JOB [--dry-run]     potstill pico teacher|bases
    potstill ledger merge OUT IN...     potstill models list|fetch NAME...

Results go to standard output, progress and errors to standard error. A fault is one line and an exit code of
`distill.errors`; Ctrl-C exits with 130 and SIGTERM with 75, both after what is done so far has been kept.
`POTSTILL_DEBUG=1` shows the traceback as well. Heavy imports wait until a command needs them.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from typing import Annotated, NoReturn

import typer

from distill.errors import EnvironmentFault, PotstillError
from pipelines.cli import chain, compare, doctor, init, ledger, models, regrade, reproduce, serving, training, zoo
from pipelines.preemption import preemptible
from pipelines.printing import say

INTERRUPTED = 130
ASKS = "init"  # the one command that asks a person anything

app = typer.Typer(
    help="Distil a reasoning teacher into small models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for commands in (
    *(init.app, chain.app, compare.app, regrade.app, reproduce.app, serving.app, doctor.app, zoo.app),
    *(models.app, training.app, training.pico, ledger.app),
):
    app.add_typer(commands)


def _print_version(wanted: bool) -> None:
    if wanted:
        from distill.manifest import version_of

        typer.echo(f"potstill {version_of('potstill')}")
        raise typer.Exit


@app.callback()
def options(
    version_: Annotated[
        bool, typer.Option("--version", help="show the version and exit", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Distil a reasoning teacher into small models."""


def main() -> NoReturn:
    """Entry point of the `potstill` command. Ctrl-C ends it however it was started."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # behind `&` a shell has it ignored
    if sys.argv[1:2] != [ASKS]:
        _close_stdin()
    try:
        try:
            with preemptible():
                app(prog_name="potstill")
        except SystemExit as exc:
            if exc.code == INTERRUPTED:  # how typer reports Ctrl-C inside a command
                raise KeyboardInterrupt from exc
            raise
    except KeyboardInterrupt:
        say("potstill: interrupted; the same command goes on from here", err=True)
        sys.exit(INTERRUPTED)
    except Exception as exc:
        fault = _fault(exc)
        if fault is None:
            raise
        if os.environ.get("POTSTILL_DEBUG"):
            traceback.print_exception(exc)
        say(f"potstill: {fault}", err=True)
        sys.exit(fault.exit_code)
    sys.exit(0)


def _close_stdin() -> None:
    """Leave standard input empty, so that no library can ask there what it may do, and take `y` from a pipe."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)


def _fault(exc: BaseException) -> PotstillError | None:
    """The fault behind an exception; libraries report a full disk and exhausted memory in many words."""
    if isinstance(exc, PotstillError):
        return exc
    text = str(exc)
    if "No space left on device" in text or "os error 28" in text or "disk is full" in text:
        return EnvironmentFault(f"the disk is full ({text}); free it and run the same command again")
    if isinstance(exc, MemoryError):
        return EnvironmentFault("this machine's memory does not suffice")
    return None
