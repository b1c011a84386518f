"""The command line; what it prints goes through `pipelines.printing`.

    potstill run|generate|distill|eval|compare RECIPE [--set a.b=value] [--out runs]
    potstill push|push-traces|serve RECIPE [--dry-run]     potstill doctor [RECIPE]     potstill zoo list|show
    potstill pretrain RECIPE (under torchrun)     potstill launch JOB [--dry-run]     potstill pico teacher|bases
    potstill ledger merge OUT IN...

Results go to standard output, progress and errors to standard error. A fault is one line and an exit code of
`distill.errors`; Ctrl-C exits with 130 and SIGTERM with 75, both after what is done so far has been kept.
`POTSTILL_DEBUG=1` shows the traceback as well. Heavy imports wait until a command needs them.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from distill.errors import EnvironmentFault, PotstillError, RecipeError, UserInputError
from pipelines.preemption import preemptible
from pipelines.printing import say, say_table

if TYPE_CHECKING:
    from distill.findings import Finding
    from distill.progress import Progress
    from distill.recipe import Recipe, TeacherConfig
    from distill.records import Sampling

INTERRUPTED = 130

app = typer.Typer(
    help="Distil a reasoning teacher into small models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
zoo = typer.Typer(help="The students that potstill knows.", no_args_is_help=True)
app.add_typer(zoo, name="zoo")
pico = typer.Typer(help="Make the bundled pico models again (needs a GPU to be quick).", no_args_is_help=True)
app.add_typer(pico, name="pico")
ledger = typer.Typer(help="Ledgers of samples.", no_args_is_help=True)
app.add_typer(ledger, name="ledger")

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="recipe file (pipelines/recipes/*.yaml)")]
Overrides = Annotated[
    list[str], typer.Option("--set", metavar="A.B=VALUE", help="override one field of the recipe; may be repeated")
]
Runs = Annotated[Path, typer.Option("--out", metavar="FOLDER", help="where runs are kept")]


@app.command("run")
def run_(recipe: RecipePath, set_: Overrides = [], out: Runs = Path("runs")) -> None:
    """Run the whole chain: generate, distill, eval, compare."""
    _run_stages("run", recipe, set_, out)


@app.command()
def generate(recipe: RecipePath, set_: Overrides = [], out: Runs = Path("runs")) -> None:
    """Let the teacher write its traces."""
    _run_stages("generate", recipe, set_, out)


@app.command()
def distill(recipe: RecipePath, set_: Overrides = [], out: Runs = Path("runs")) -> None:
    """Verify and filter the traces, then train the students."""
    _run_stages("distill", recipe, set_, out)


@app.command("eval")
def eval_(recipe: RecipePath, set_: Overrides = [], out: Runs = Path("runs")) -> None:
    """Score teacher, bases and students."""
    _run_stages("eval", recipe, set_, out)


@app.command()
def compare(recipe: RecipePath, set_: Overrides = [], out: Runs = Path("runs")) -> None:
    """Write the report that compares the sizes."""
    _run_stages("compare", recipe, set_, out)


@app.command()
def push(
    recipe: RecipePath,
    set_: Overrides = [],
    out: Runs = Path("runs"),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show what would be pushed, push nothing")] = False,
) -> None:
    """Push a student to the Hugging Face Hub."""
    _run_stages("push", recipe, set_, out, dry_run=dry_run)


@app.command("push-traces")
def push_traces(
    recipe: RecipePath,
    set_: Overrides = [],
    out: Runs = Path("runs"),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="lay the data set out, push nothing")] = False,
) -> None:
    """Push the traces to the Hugging Face Hub, as a data set."""
    _run_stages("push-traces", recipe, set_, out, dry_run=dry_run)


@app.command()
def serve(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="recipe file, or a model's folder")],
    set_: Overrides = [],
    host: Annotated[str, typer.Option(help="address to bind; others need $POTSTILL_API_KEY")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65_535, help="0: any free one")] = 8000,
    max_waiting: Annotated[
        int | None, typer.Option(min=1, help="samples that may wait at a native server; more are refused with 429")
    ] = None,
    speculate: Annotated[
        bool, typer.Option("--speculate", help="a native teacher drafts a token a step with its MTP layer; same texts")
    ] = False,
    reasoning_parser: Annotated[
        str | None, typer.Option(metavar="NAME", help="deepseek_r1: a native server's answers have reasoning_content")
    ] = None,
    end_loops: Annotated[bool, typer.Option("--end-loops", help="a native server ends texts that loop")] = False,
    node_rank: Annotated[int, typer.Option(min=0, help="which node this one is; others than 0 have ranks alone")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print every node's vLLM command, start nothing")] = False,
) -> None:
    """Serve the recipe's teacher, or the model in a folder, over an OpenAI-compatible HTTP API."""
    from pipelines.serving import launch_plan, serve_teacher

    with _naming(recipe):
        if dry_run:
            for command in launch_plan(_load(recipe, set_), host=host, port=port):
                typer.echo(command)
        else:
            serve_teacher(
                *_served_teacher(recipe, set_),
                host=host,
                port=port,
                base_dir=Path.cwd(),
                max_waiting=max_waiting,
                announce=say,
                node_rank=node_rank,
                speculate=speculate,
                reasoning_parser=reasoning_parser,
                end_loops=end_loops,
                progress=_progress(),
            )


@app.command()
def launch(
    job: Annotated[Path, typer.Argument(metavar="JOB", help="job file: launcher, nodes, command (docs/launch.md)")],
    set_: Overrides = [],
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="where to write what is rendered")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="render and check, start nothing")] = False,
) -> None:
    """Start a job on one machine, a Slurm or Ray cluster, or a cloud."""
    from pipelines.launch.start import start

    show = partial(typer.echo, nl=False)  # a script stays as it is, to the letter
    raise typer.Exit(start(job, set_, out=out, dry_run=dry_run, announce=say, show=show))


@app.command()
def doctor(
    recipe: Annotated[Path | None, typer.Argument(metavar="[RECIPE]", help="also check this recipe")] = None,
    set_: Overrides = [],
) -> None:
    """Check this machine, and a recipe if one is given, before anything runs."""
    from pipelines.doctor import examine_machine, examine_recipe

    here = Path.cwd()
    findings = examine_machine(here)
    if recipe is not None:
        findings += examine_recipe(recipe, set_, here)
    _print_findings(findings)
    raise typer.Exit(max(finding.exit_code for finding in findings))


@zoo.command("list")
def zoo_list() -> None:
    """List the students, smallest first."""
    from students.zoo import list_students

    say_table(
        ("name", "base", "architecture", "parameters", "licence"),
        (
            (student.name, student.base, student.architecture, f"{student.num_parameters:,}", student.licence)
            for student in list_students()
        ),
    )


@zoo.command("show")
def zoo_show(name: Annotated[str, typer.Argument(help="a name of `potstill zoo list`, or a student file")]) -> None:
    """Show one student's settings as YAML."""
    import yaml

    from students.zoo import find_student

    settings = find_student(name).model_dump(mode="json")
    typer.echo(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True).rstrip())


@ledger.command("merge")
def ledger_merge(
    target: Annotated[Path, typer.Argument(metavar="OUT", help="the ledger to merge into; made where it is not there")],
    sources: Annotated[list[Path], typer.Argument(metavar="IN...", help="ledgers of other machines; they stay")],
) -> None:
    """Merge ledgers by key: the result is the same in whatever order, and however often, it is done."""
    from distill.ledger_merge import merge_ledgers

    counts = merge_ledgers(target, sources, _progress())
    say(f"{target}: " + ", ".join(f"{name} {count}" for name, count in counts.items()))


@pico.command("teacher")
def pico_teacher(out: Annotated[Path, typer.Option("--out", metavar="FOLDER")] = Path("teacher/pico")) -> None:
    """Train the pico teacher by teacher/train/pico.yaml."""
    from teacher.train.make import load_pretrain_config, make_teacher

    say(f"wrote {make_teacher(load_pretrain_config(), out, num_workers=os.cpu_count() or 1, progress=_progress())}")


@app.command()
def pretrain(
    recipe: RecipePath,
    set_: Overrides = [],
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="the model folder")] = Path("teacher-trained"),
    held_out: Annotated[int, typer.Option(min=1, help="problems a family for the card's accuracy")] = 64,
) -> None:
    """Train a teacher over the recipe's layout, one process a rank: torchrun --no-python potstill pretrain ..."""
    from distill.progress import silent
    from teacher.train.make import Launch, load_pretrain_config, make_teacher

    rank, num_ranks, local_rank, num_local = (
        int(os.environ.get(name, default))
        for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1))
    )
    init_method = "env://" if "WORLD_SIZE" in os.environ else "tcp://127.0.0.1:0"
    try:
        folder = make_teacher(
            load_pretrain_config(recipe, set_), out, launch=Launch(rank, num_ranks, local_rank, init_method, recipe),
            num_workers=max(1, (os.cpu_count() or 1) // num_local), held_out_per_family=held_out,
            progress=silent() if rank else _progress(),
        )  # fmt: skip
    except UserInputError as exc:
        if rank == 0:
            raise
        raise typer.Exit(exc.exit_code) from exc  # one rank says what all of them found
    if rank == 0:
        say(f"wrote {folder}")


@pico.command("bases")
def pico_bases(
    names: Annotated[list[str] | None, typer.Argument(help="which; none: all")] = None,
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER")] = Path("students/pico"),
) -> None:
    """Pre-train the pico bases by students/pretrain/pico.yaml, side by side on one device."""
    from students.pretrain.bases import load_bases_config, make_bases

    for folder in make_bases(load_bases_config(), out, names=names or None, num_workers=4, progress=_progress()):
        say(f"wrote {folder}")


# --- what the commands share ------------------------------------------------------------------------------------------


def _load(path: Path, overrides: list[str]) -> Recipe:
    from distill.recipe import load_recipe

    return load_recipe(path, overrides)


def _served_teacher(path: Path, overrides: list[str]) -> tuple[TeacherConfig, Sampling]:
    """The teacher to serve, and the sampling of requests that leave it open."""
    from distill.recipe import NativeTeacher
    from distill.records import Sampling as Settings

    if not path.is_dir():
        recipe = _load(path, overrides)
        return recipe.teacher, recipe.generate.sampling
    if overrides:
        raise RecipeError("overrides a field of a recipe; a model's folder has none", where="--set")
    return NativeTeacher(model=str(path)), Settings()


def _run_stages(command: str, path: Path, overrides: list[str], out: Path, *, dry_run: bool = False) -> None:
    from pipelines import chain
    from pipelines.context import Context

    recipe = _load(path, overrides)
    run_dir = out / recipe.name
    context = Context(base_dir=Path.cwd(), progress=_progress(), dry_run=dry_run)
    with _naming(path):
        stages = chain.prepare(command, recipe, run_dir, context)
        say(f"recipe {recipe.name} ({path}) in {run_dir}")
        for stage in stages:
            outcome = stage.run()
            say(f"  {'dry run: nothing is pushed' if dry_run else outcome.line()}")
            if command in ("push", "push-traces"):
                _print_push(outcome.manifest.counts)
    if "compare" in chain.COMMANDS[command]:
        _print_report(run_dir / "report")


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Rooms that see a part of the recipe call it `recipe`; here its file is known."""
    try:
        yield
    except RecipeError as exc:
        if exc.where != "recipe":
            raise
        prefix = ": ".join(part for part in ("recipe", exc.field) if part) + ": "
        raise RecipeError(str(exc).removeprefix(prefix), where=path, field=exc.field) from exc


def _progress() -> Progress:
    from rich.console import Console

    from pipelines.display import BarProgress, PlainProgress

    console = Console(stderr=True)
    return BarProgress(console) if console.is_terminal else PlainProgress(sys.stderr)


def _print_push(counts: dict[str, Any]) -> None:
    """Print where the model or the data set goes and of which files it consists."""
    if "folder" in counts:
        say(f"laid out in {counts['folder']}")
    say(f"{counts['repo']} ({'private' if counts['private'] else 'public'}) {counts.get('url', '')}".rstrip())
    say_table(("file", "bytes"), ((name, f"{size:,}") for name, size in counts["tree"].items()))


def _print_report(folder: Path) -> None:
    """The headline of a report: every model's score on whole suites, and where to read more."""
    import json

    rows = []
    for model in json.loads((folder / "summary.json").read_text(encoding="utf-8"))["models"]:
        if "/" not in model["suite"]:
            score = f"{100 * model['value']:.1f} ± {100 * model['stderr']:.1f}"
            count = f"{model['num_parameters']:,}"
            rows.append((model["name"], model["role"], count, f"{model['suite']} {model['metric']}", score))
    say_table(("model", "role", "parameters", "suite", "score"), rows)
    say(f"report: {folder / 'index.html'}")


def _print_findings(findings: list[Finding]) -> None:
    say_table(("", "check", "found"), ((finding.state, finding.check, finding.text) for finding in findings))


# --- faults and exit codes --------------------------------------------------------------------------------------------


def main() -> NoReturn:
    """Entry point of the `potstill` command. Ctrl-C ends it however it was started."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # behind `&` a shell has it ignored
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
