"""A job as text for its launcher: a bash script, or SkyPilot's YAML."""

from __future__ import annotations

import shlex
from pathlib import Path

import jinja2
import yaml

from pipelines.launch.config import END_OF_NODE, LaunchConfig
from pipelines.launch.nodes import file_of_ours, node_commands

# How a node learns its number and the first one's address.
_PLACES = {
    "torchrun": "export NODE_RANK=0 HEAD=127.0.0.1",
    "slurm": 'export NODE_RANK="$SLURM_NODEID"',
    "ray": ': "$NODE_RANK" "$HEAD"',
    "skypilot": 'NODE_RANK="$SKYPILOT_NODE_RANK"\nHEAD="$(head -n 1 <<<"$SKYPILOT_NODE_IPS")"\nexport NODE_RANK HEAD',
}
_templates = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    autoescape=False,
)
_templates.filters["quote"] = shlex.quote


def node_script(config: LaunchConfig) -> str:
    """The commands that each node runs."""
    first, others = node_commands(config)
    return _templates.get_template("node.sh.jinja").render(
        config=config, place=_PLACES[config.launcher], first=first, others=others, record=config.launcher == "slurm"
    )


def render(config: LaunchConfig) -> str:
    node = node_script(config)
    if config.launcher == "skypilot":
        return _sky_task(config, node)
    script = Path(config.workdir) / file_of_ours("pipelines/launch/ray_nodes.py")
    text = _templates.get_template(f"{config.launcher}.sh.jinja").render(
        config=config.model_dump(), node=node, end=END_OF_NODE, script=str(script)
    )
    return text + "\n"


def _sky_task(config: LaunchConfig, node: str) -> str:
    """One task for `sky launch` or `sky jobs launch`; the latter starts it again after 75."""
    options = config.skypilot
    resources = {
        "infra": options.infra,
        "accelerators": f"{options.gpu}:{config.gpus_per_node}" if config.gpus_per_node else None,
        "instance_type": options.instance_type,
        "use_spot": options.use_spot,
        "disk_size": options.disk_gb,
        "job_recovery": {"max_restarts_on_errors": 3, "recover_on_exit_codes": [75]},  # 75 is not counted
    }
    task = {
        "name": config.name,
        "num_nodes": config.nodes,
        "resources": {name: value for name, value in resources.items() if value is not None},
        "secrets": dict.fromkeys(config.secrets),
        "run": node,
    }
    return yaml.dump({name: value for name, value in task.items() if value}, Dumper=_Blocks, sort_keys=False)


class _Blocks(yaml.SafeDumper):
    """Scripts as they are written, line by line."""


def _block(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Blocks.add_representer(str, _block)
