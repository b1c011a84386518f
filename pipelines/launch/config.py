"""The fields of a job file. Whatever ends in a header or a name is restricted to what needs no quotes there."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, StringConstraints, model_validator

from distill.recipe import Config
from pipelines.ports import SERVE_PORT

Launcher = Literal["torchrun", "slurm", "ray", "skypilot"]
Job = Literal["run", "generate", "serve", "pretrain", "train"]
Word = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.,:@=+/#-]*$")]
Variable = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
_SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|API_?KEY", re.IGNORECASE)
END_OF_NODE = "POTSTILL_NODE"  # the line that ends a node's script inside another


class SlurmOptions(Config):
    """`grace_s`: how long before the time limit tasks hear SIGTERM. `container`: an image for pyxis."""

    partition: Word | None = None
    account: Word | None = None
    qos: Word | None = None
    constraint: Word | None = None
    time: Annotated[str, StringConstraints(pattern=r"^(\d+-)?\d{1,2}:\d{2}:\d{2}$")] = "24:00:00"
    grace_s: int = Field(180, ge=10, le=65_535)
    container: Word | None = None


class RayOptions(Config):
    """`address`: of the cluster's dashboard."""

    address: Word = "http://127.0.0.1:8265"


class SkyPilotOptions(Config):
    """`infra`: cloud, region and zone, where it matters. `gpu`: the kind; on AWS H100 is p5, H200 is p5en."""

    infra: Word | None = None
    gpu: Word = "H200"
    instance_type: Word | None = None
    use_spot: bool = False
    disk_gb: int = Field(1024, ge=32)


class LaunchConfig(Config):
    """`job`: a command of potstill's over nodes, or `train`, one student under accelerate with FSDP2.

    `recipe` is the command's; `train` has a `student` and the `examples` that were curated for it. Paths are the
    nodes', relative to `workdir`, which is on a file system that they share. `setup` are lines of shell before the
    command, to activate an environment, say. `env` is written into the job; what is secret is named in `secrets` and
    must be in the environment that the job runs in.
    """

    name: Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([a-z0-9-]{0,50}[a-z0-9])?$")]
    launcher: Launcher
    job: Job
    recipe: str | None = None
    student: str | None = None
    examples: str | None = None
    overrides: tuple[str, ...] = ()
    arguments: tuple[str, ...] = Field((), description="further ones of the command")
    out: str = "runs"
    nodes: int = Field(1, ge=1, le=4096)
    gpus_per_node: int = Field(8, ge=0, le=16)
    processes_per_node: int | None = Field(None, ge=1, description="None: one a GPU")
    workdir: str
    setup: tuple[str, ...] = ()
    env: dict[Variable, str] = Field(default_factory=dict)
    secrets: tuple[Variable, ...] = ()
    host: Word = "127.0.0.1"
    port: int = Field(SERVE_PORT, ge=1, le=65_535, description="of the endpoint")
    rendezvous_port: int = Field(29_500, ge=1, le=65_535)
    slurm: SlurmOptions = SlurmOptions()
    ray: RayOptions = RayOptions()
    skypilot: SkyPilotOptions = SkyPilotOptions()

    @property
    def processes(self) -> int:
        """Processes of one node."""
        return self.processes_per_node or max(1, self.gpus_per_node)

    @model_validator(mode="after")
    def _fits(self) -> LaunchConfig:
        if self.launcher == "torchrun" and self.nodes > 1:
            raise ValueError(f"nodes: torchrun starts one node, got {self.nodes}; slurm, ray and skypilot start more")
        needed = ("student", "examples") if self.job == "train" else ("recipe",)
        for field in needed:
            if getattr(self, field) is None:
                raise ValueError(f"{field}: a job of kind {self.job!r} needs one")
        for name in self.env:
            if _SECRET.search(name):
                raise ValueError(f"env.{name}: looks like a secret, which would be written down; name it in secrets")
        for text in (
            *self.setup,
            *self.env.values(),
            *self.overrides,
            *self.arguments,
            self.workdir,
            self.out,
            self.recipe or "",
        ):
            if "\0" in text or END_OF_NODE in text:
                raise ValueError(f"{text!r} holds what ends a script")
        return self
