"""The call of `vllm serve`: arguments and environment of every node, checked against the vLLM that is installed.

The recipe's flags go through as they are; what decides who may ask the server is added here: it binds to loopback
unless told otherwise, answers its allow-list of routes alone, sends no usage statistics, and takes its key from the
environment, so that no process list shows it. On vLLM's CPU build the engine runs eagerly (compiling costs minutes).

Several nodes: node 0 answers HTTP and holds the first ranks, the others run without (`--headless`) and report to it.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from packaging.version import Version

from distill.errors import EnvironmentFault, RecipeError, nearest
from distill.hash_cache import cache_folder
from distill.manifest import write_atomically
from distill.recipe import FlagValue, VllmServing, VllmTeacher
from distill.records import content_id

VERSION_FLOOR = "0.22.0"
KEY_VARIABLE = "VLLM_API_KEY"
MIDDLEWARE = f"{__package__}.routes.AllowList"
# Weights arrive from disk or network at no less than this; the rest is imports, kernels, CUDA graphs.
LOAD_BYTES_PER_S = 200e6
STARTUP_S = 300.0
DOWNLOAD_S = 6 * 3600.0
CPU_KV_CACHE_GB = "1"


@dataclass(frozen=True)
class Launch:
    """One node's `vllm serve`: its arguments after the program, and the variables it needs beside the key."""

    node_rank: int
    arguments: tuple[str, ...]
    environment: Mapping[str, str]

    @property
    def command(self) -> list[str]:
        return [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", *self.arguments]

    def shell(self, api_key_env: str) -> str:
        """The same as one line for a shell; the key is named, not shown."""
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        if "--headless" not in self.arguments:
            variables.append(f'{KEY_VARIABLE}="${api_key_env}"')
        return " ".join([*variables, "vllm", "serve", *map(shlex.quote, self.arguments)])


def installed_version() -> str:
    """The version of vLLM. Raises EnvironmentFault where there is none or one that is too old."""
    try:
        version = importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError as exc:
        message = "is not installed: `make setup-vllm` for its CPU build, `pip install potstill[vllm]` on a GPU"
        raise EnvironmentFault(message, where="vllm") from exc
    if Version(version) < Version(VERSION_FLOOR):
        raise EnvironmentFault(f"{version} is too old: potstill needs {VERSION_FLOOR} or later", where="vllm")
    return version


def is_cpu_build(version: str) -> bool:
    return "cpu" in version


def plan(config: VllmTeacher, *, host: str, port: int, on_cpu: bool = False) -> list[Launch]:
    """The commands, one a node. Node 0 listens on `host`:`port`."""
    size = config.flags.get("data-parallel-size", 1)
    assert isinstance(size, int)
    local = size // config.num_nodes
    launches = []
    for rank in range(config.num_nodes):
        extra: list[str] = []
        if config.num_nodes > 1:
            assert config.head_address is not None
            extra += ["--data-parallel-size-local", str(local), "--data-parallel-address", config.head_address]
            extra += ["--data-parallel-rpc-port", str(config.rpc_port)]
        if rank:
            extra += ["--headless", "--data-parallel-start-rank", str(rank * local)]
        else:
            extra += listening(host=host, port=port, name=served_name(config.model))
        launches.append(launch(config, config.model, config.revision, extra, node_rank=rank, on_cpu=on_cpu))
    return launches


def launch(
    config: VllmServing, model: str, revision: str, extra: Iterable[str], *, node_rank: int = 0, on_cpu: bool = False
) -> Launch:
    """The recipe's flags, and after them `extra`."""
    environment = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    flags: dict[str, FlagValue] = {"generation-config": "vllm"}  # the recipe alone says how is sampled
    if Path(model).is_dir():
        environment["HF_HUB_OFFLINE"] = "1"
    else:
        flags |= {"revision": revision, "tokenizer-revision": revision}
    if on_cpu:
        environment["VLLM_CPU_KVCACHE_SPACE"] = CPU_KV_CACHE_GB
        flags |= {"dtype": "bfloat16", "enforce-eager": True}
    arguments = [model, *rendered(flags | config.flags), *extra]
    return Launch(node_rank, tuple(arguments), environment | config.environment)


def listening(*, host: str, port: int, name: str) -> list[str]:
    """The arguments that say where the API is, what its model is called and what it answers."""
    arguments = ["--host", host, "--port", str(port), "--served-model-name", name]
    return [*arguments, "--middleware", MIDDLEWARE, "--disable-fastapi-docs", "--disable-uvicorn-access-log"]


def served_name(model: str) -> str:
    """A folder's name; a Hub repository is called what it is called there."""
    return Path(model).resolve().name if Path(model).is_dir() else model


def rendered(flags: Mapping[str, FlagValue]) -> list[str]:
    arguments: list[str] = []
    for name, value in flags.items():
        if value is None:
            continue
        if isinstance(value, bool):
            arguments.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, dict):
            arguments += [f"--{name}", json.dumps(value, separators=(",", ":"))]
        else:
            arguments += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return arguments


def startup_timeout_s(config: VllmServing, model: str) -> float:
    """The time that a server may take to come up: the recipe's word, else by the size of the weights.

    Weights that are not on this machine are downloaded first.
    """
    if config.startup_timeout_s is not None:
        return config.startup_timeout_s
    folder = Path(model)
    if not folder.is_dir():
        return DOWNLOAD_S
    size = sum(path.stat().st_size for path in folder.iterdir() if path.suffix in (".safetensors", ".bin"))
    return STARTUP_S + size / LOAD_BYTES_PER_S


# --- the installed vLLM's flags ---------------------------------------------------------------------------------------


def installed_flags() -> dict[str, tuple[str, ...]]:
    """Every flag of `vllm serve` with its choices (none: any value), as its help tells.

    That takes half a minute, once an installation: the answer is kept in the cache folder.
    """
    spec = importlib.util.find_spec("vllm")
    origin = Path(spec.origin) if spec is not None and spec.origin is not None else Path(sys.prefix)
    known_as = content_id([installed_version(), str(origin), origin.stat().st_mtime_ns])
    kept = cache_folder() / "vllm-flags" / f"{known_as}.json"
    with contextlib.suppress(OSError, ValueError):
        return {name: tuple(choices) for name, choices in json.loads(kept.read_text(encoding="utf-8")).items()}
    flags = _ask_flags()
    write_atomically(kept, json.dumps(flags))
    return flags


def _ask_flags() -> dict[str, tuple[str, ...]]:
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", "--help=all"]
    environment = {**os.environ, "COLUMNS": "200", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    try:
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=True)
    except (OSError, subprocess.SubprocessError) as exc:
        raise EnvironmentFault(f"does not tell its flags ({exc})", where="vllm serve --help=all") from exc
    return parse_help(result.stdout)


def parse_help(text: str) -> dict[str, tuple[str, ...]]:
    """The flags of an argparse help text: lines indented by two that begin with a dash."""
    flags: dict[str, tuple[str, ...]] = {}
    for line in text.splitlines():
        if not re.match(r"  -\S", line):
            continue
        choices = re.search(r"--[\w.-]+ \{([^}]*)\}(?:$|,|\s{2})", line)  # `{a,b} or ...` is open
        allowed = tuple(choices[1].split(",")) if choices else ()
        # Up to two blanks is the flag and its value, then comes what it does.
        for name in re.findall(r"--([\w.-]+)", re.split(r"(?<=\S)\s{2,}", line.strip())[0]):
            flags[name] = allowed
    return flags


def check_flags(launches: Iterable[Launch], flags: Mapping[str, tuple[str, ...]], version: str) -> None:
    """Raise RecipeError, naming flag and version, for the first flag or value that this vLLM does not know."""
    for planned in launches:
        arguments = planned.arguments
        for place, argument in enumerate(arguments):
            if not argument.startswith("--"):
                continue
            name = argument.removeprefix("--")
            if name not in flags:
                message = f"vLLM {version} has no flag --{name}; {nearest(name, flags) if flags else ''}"
                raise RecipeError(_short(message), where="recipe", field="teacher.flags")
            value = arguments[place + 1] if place + 1 < len(arguments) else ""
            if flags[name] and value not in flags[name]:
                message = f"vLLM {version} takes for --{name} one of {', '.join(flags[name])}; got {value!r}"
                raise RecipeError(message, where="recipe", field="teacher.flags")


def _short(message: str) -> str:
    """Without the list of all 300 flags where none is near."""
    return message.partition("; allowed:")[0]
