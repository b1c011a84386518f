"""The script that every node of a job runs: NODE_RANK says which it is, HEAD where the first one is."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from distill.bundled import bundled
from pipelines.launch.config import LaunchConfig

ABOVE = __package__.removesuffix("pipelines.launch")  # `potstill.` where potstill is installed
TRAIN = f"{ABOVE}students.launch"
FSDP = "students/accelerate/fsdp2.yaml"


class OfNode(NamedTuple):
    """A word of a command that ends in a variable of the script's."""

    before: str
    variable: str


def node_commands(config: LaunchConfig) -> tuple[str, str]:
    """The first node's command and the others', shell text: the others of a teacher's plan are its headless nodes."""
    if config.job == "pretrain":
        torchrun = [
            "torchrun", f"--nnodes={config.nodes}", f"--nproc-per-node={config.processes}",
            OfNode("--node-rank=", "NODE_RANK"), OfNode("--master-addr=", "HEAD"),
            f"--master-port={config.rendezvous_port}", "--max-restarts=3", "--no-python",
        ]  # fmt: skip
        command = [*torchrun, "potstill", "pretrain", config.recipe or "", *_overrides(config)]
        command += ["--out", config.out, *config.arguments]
        return _shell(command), _shell(command)
    if config.job == "train":
        accelerate = [
            "accelerate", "launch", "--config_file", str(file_of_ours(FSDP)), f"--num_machines={config.nodes}",
            f"--num_processes={config.nodes * config.processes}", OfNode("--machine_rank=", "NODE_RANK"),
            OfNode("--main_process_ip=", "HEAD"), f"--main_process_port={config.rendezvous_port}",
        ]  # fmt: skip
        trained = ["--student", config.student or "", "--examples", config.examples or "", "--out", config.out]
        command = [*accelerate, "-m", TRAIN, *trained, *_overrides(config), *config.arguments]
        return _shell(command), _shell(command)
    head = ["--set", OfNode("teacher.head_address=", "HEAD")] if config.nodes > 1 else []
    of_recipe = [config.recipe or "", *_overrides(config), *head]
    server = ["potstill", "serve", *of_recipe, "--host", config.host, "--port", str(config.port)]
    own = ["potstill", config.job, *of_recipe, "--out", config.out, *config.arguments]
    if config.job == "serve":
        server = own = [*server, *config.arguments]
    others = [*server, "--node-rank", OfNode("", "NODE_RANK")]
    if config.nodes == 1:
        return _shell(own), _shell(own)
    return _shell(others if config.job == "serve" else own), _shell(others)


def file_of_ours(path: str) -> Path:
    """A file of these packages as a node names it: from its checkout's folder, or where every node has it installed."""
    return bundled(path) if ABOVE else Path(path)


def _overrides(config: LaunchConfig) -> list[str]:
    return [part for override in config.overrides for part in ("--set", override)]


def _shell(words: Iterable[str | OfNode]) -> str:
    return " ".join(
        f'{word.before}"${word.variable}"' if isinstance(word, OfNode) else shlex.quote(word) for word in words
    )
