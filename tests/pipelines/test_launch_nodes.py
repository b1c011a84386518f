"""Jobs for every launcher: what is rendered parses, quotes what it is given, and really runs where that can be."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from distill.errors import EnvironmentFault, RecipeError
from distill.recipe import load_settings, parse
from pipelines.cli import app
from pipelines.launch.check import check, submit
from pipelines.launch.config import LaunchConfig
from pipelines.launch.recipes import check_recipe
from pipelines.launch.render import render
from tests.repository import REPOSITORY

LAUNCHERS = ("torchrun", "slurm", "ray", "skypilot")
JOBS = ("run", "generate", "serve", "pretrain", "train")
CANARY = "sk-canary-7731"
PRETRAIN = {
    "architecture": {
        "hidden_size": 32, "intermediate_size": 24, "moe_intermediate_size": 8, "num_hidden_layers": 2,
        "num_attention_heads": 2, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4,
        "v_head_dim": 4, "n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 1, "topk_group": 1,
        "first_k_dense_replace": 1, "num_nextn_predict_layers": 1, "max_position_embeddings": 512,
    },
    "vocab_size": 400, "num_problems": 1_600, "row_length": 256, "rows_per_step": 8, "num_steps": 2,
    "layout": {"dispatch": "fp32", "combine": "fp32"},
}  # fmt: skip


def config(**changes: Any) -> LaunchConfig:
    fields = {
        "name": "traces", "launcher": "slurm", "job": "generate", "recipe": "recipes/r1-two-nodes.yaml", "nodes": 2,
        "workdir": "/shared/potstill", "student": "r1-distill-qwen-7b", "examples": "runs/r1/curate/examples.parquet",
    }  # fmt: skip
    fields |= {"nodes": 1} if changes.get("launcher") == "torchrun" else {}
    return parse(LaunchConfig, fields | changes, where="job.yaml")


def script_of(config: LaunchConfig) -> str:
    text = render(config)
    return yaml.safe_load(text)["run"] if config.launcher == "skypilot" else text


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("job", JOBS)
def test_what_is_rendered_passes_its_check(launcher: str, job: str, tmp_path: Path) -> None:
    given = config(launcher=launcher, job=job, setup=["source .venv/bin/activate"], secrets=["HF_TOKEN"])
    assert "bash -n" in check(given, render(given))
    script = tmp_path / "job.sh"
    script.write_text(script_of(given))
    if shutil.which("shellcheck"):
        judged = subprocess.run(["shellcheck", "-s", "bash", "-e", "SC1091", script], capture_output=True, text=True)
        assert judged.returncode == 0, judged.stdout


def test_plans_over_nodes_say_who_is_who() -> None:
    generate = script_of(config())
    assert 'potstill generate recipes/r1-two-nodes.yaml --set teacher.head_address="$HEAD" --out runs' in generate
    assert '--port 8000 --node-rank "$NODE_RANK"' in generate
    pretrain = script_of(config(job="pretrain", nodes=4, overrides=["layout.pp=4"]))
    assert '--nnodes=4 --nproc-per-node=8 --node-rank="$NODE_RANK" --master-addr="$HEAD"' in pretrain
    train = script_of(config(job="train", nodes=3, gpus_per_node=4))
    assert '--num_machines=3 --num_processes=12 --machine_rank="$NODE_RANK" --main_process_ip="$HEAD"' in train
    assert "head_address" not in script_of(config(launcher="torchrun"))


# --- what is given in a file ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"partitoin": "x"}, "partitoin: unknown key"),
        ({"slurm": {"partitoin": "x"}}, "did you mean 'partition'?"),
        ({"slurm": {"partition": "a b"}}, "slurm.partition"),
        ({"slurm": {"time": "tomorrow"}}, "slurm.time"),
        ({"name": "x; reboot"}, "name"),
        ({"nodes": 0}, "nodes"),
        ({"launcher": "torchrun", "nodes": 2}, "nodes: torchrun starts one node"),
        ({"launcher": "kubernetes"}, "launcher"),
        ({"recipe": None}, "recipe: a job of kind 'generate' needs one"),
        ({"job": "train", "student": None}, "student: a job of kind 'train' needs one"),
        ({"env": {"HF_TOKEN": CANARY}}, "env.HF_TOKEN: looks like a secret"),
        ({"env": {"A-B": "x"}}, "env"),
        ({"setup": ["echo POTSTILL_NODE"]}, "ends a script"),
    ],
    ids=str,
)
def test_bad_input_is_one_line_and_writes_nothing(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    path, out = tmp_path / "job.yaml", tmp_path / "job.sh"
    tree = {"name": "t", "launcher": "slurm", "job": "generate", "recipe": "r.yaml", "nodes": 2, "workdir": "/w"}
    path.write_text(yaml.safe_dump(tree | change))
    command = [sys.executable, "-m", "potstill", "launch", str(path), "--dry-run", "--out", str(out)]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert result.returncode == 2, result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert str(path) in result.stderr
    assert said in result.stderr
    assert CANARY not in result.stderr
    assert not out.exists()


NATIVE = {
    "name": "r",
    "problems": [{"kind": "local", "path": "p.jsonl"}],
    "teacher": {"backend": "native", "model": "m", "num_ranks": 16, "num_nodes": 2, "head_address": "h"},
    "distill": {"students": ["qwen2-0.2m"]},
    "eval": {"suites": ["gsm8k"]},
}


@pytest.mark.parametrize(
    ("job", "recipe", "said"),
    [
        ({}, NATIVE, None),
        ({}, {"extends": "nowhere.yaml"}, "nowhere.yaml"),
        ({"nodes": 3}, NATIVE, "teacher.num_nodes: the recipe's teacher is for 2, the job has 3"),
        ({"overrides": ["teacher.num_ranks=15"]}, NATIVE, "num_ranks: must be a multiple of num_nodes 2, got 15"),
        ({"overrides": ["teacher.num_rank=16"]}, NATIVE, "num_rank"),
        ({"gpus_per_node": 4}, NATIVE, "teacher.num_ranks: 8 ranks of a node need a GPU each, the job has 4"),
        ({"secrets": []}, NATIVE, "secrets: POTSTILL_API_KEY must be among them: nodes know each other by it"),
        ({"job": "pretrain", "overrides": ["layout.ep=16"]}, PRETRAIN, None),
        ({"job": "pretrain"}, PRETRAIN, "layout: is for 1 ranks, the job has 16"),
        ({"job": "train", "student": "qwen2-0.3m"}, NATIVE, "no student 'qwen2-0.3m' in the zoo"),
        ({"job": "train", "student": "qwen2-0.2m", "overrides": ["lr=1e-4"]}, NATIVE, None),
        ({"job": "train", "student": "qwen2-0.2m", "overrides": ["rl=1e-4"]}, NATIVE, "rl"),
        (
            {"job": "serve", "nodes": 1, "host": "0.0.0.0", "overrides": ["teacher.num_nodes=1"], "secrets": [],
             "gpus_per_node": 16},
            NATIVE,
            "secrets: POTSTILL_API_KEY must be among them: 0.0.0.0 can be reached from outside",
        ),
    ],
    ids=str,
)  # fmt: skip
def test_a_recipe_that_is_not_for_these_nodes_is_refused(
    job: dict[str, Any], recipe: dict[str, Any], said: str | None, tmp_path: Path
) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    tree = {"recipe": "recipe.yaml", "workdir": str(tmp_path), "secrets": ["POTSTILL_API_KEY"], "examples": "e.parquet"}
    given = config(**tree | job)
    if said is None:
        assert check_recipe(given) is not None
    else:
        with pytest.raises(RecipeError, match=re.escape(said)):
            check_recipe(given)


def test_a_recipe_that_the_nodes_have_alone_is_not_checked() -> None:
    assert check_recipe(config(recipe="r1.yaml")) is None


def test_setup_that_is_no_bash_is_refused() -> None:
    for launcher in LAUNCHERS:
        with pytest.raises(RecipeError, match="no bash"):
            check(given := config(launcher=launcher, setup=["if then ("]), render(given))


def test_a_header_that_slurm_does_not_know_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    given = config()
    assert check(given, render(given)) == "bash -n, sbatch's options"
    for wrong in ("#SBATCH --nodse=2\n", "#SBATCH --nodes=two\n", "#SBATCH -N 2\n"):
        with pytest.raises(RecipeError, match="no option of sbatch's"):
            check(given, render(given).replace("#SBATCH --nodes=2\n", wrong))
    task = config(launcher="skypilot")
    with pytest.raises(RecipeError, match="num_node"):
        check(task, render(task).replace("num_nodes: 2", "num_node: 2"))
    with pytest.raises(RecipeError, match="disk_size"):
        check(task, render(task).replace("disk_size: 1024", "disk_size: '1024'"))


def test_a_launcher_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    for launcher, program in (("slurm", "sbatch"), ("ray", "ray"), ("skypilot", "sky")):
        with pytest.raises(EnvironmentFault, match=program):
            submit(config(launcher=launcher), tmp_path / "job")


def test_a_dry_run_prints_or_writes(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("{name: t, launcher: skypilot, job: serve, recipe: r.yaml, workdir: /w}")
    printed = CliRunner().invoke(app, ["launch", str(path), "--dry-run", "--set", "nodes=2"])
    assert printed.exit_code == 0
    assert printed.stdout == render(load_settings(LaunchConfig, path, ["nodes=2"]))
    out = tmp_path / "t.yaml"
    assert CliRunner().invoke(app, ["launch", str(path), "--dry-run", "--out", str(out)]).exit_code == 0
    assert yaml.safe_load(out.read_text())["num_nodes"] == 1


# --- what runs --------------------------------------------------------------------------------------------------------


def program(folder: Path, name: str, body: str) -> None:
    path = folder / name
    path.write_text(f"#!{sys.executable}\n" + textwrap.dedent(body))
    path.chmod(0o755)


def run(script: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    outside = os.environ | {"PATH": f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"} | environment
    return subprocess.run(["bash", "-c", script], env=outside, capture_output=True, text=True, timeout=200, check=False)


def test_hostile_values_arrive_as_they_are(tmp_path: Path) -> None:
    workdir = tmp_path / 'it\'s a $(touch evil) "dir"'
    workdir.mkdir()
    record = "import json, os, sys; json.dump([sys.argv[1:], os.getcwd(), os.environ['ODD']], open('said.json', 'w'))\n"
    program(tmp_path, "potstill", record)
    hostile = ["a.b=$(touch evil)", "c='; touch evil; '", 'd="$HOME" `id` \\ *', "-x", "e=$HEAD and $NODE_RANK"]
    odd = {"ODD": "$(id) 'x'\n"}
    given = config(launcher="torchrun", workdir=str(workdir), overrides=hostile, recipe="my recipe's.yaml", env=odd)
    result = run(render(given), tmp_path)
    assert result.returncode == 0, result.stderr
    argv, cwd, found = json.loads((workdir / "said.json").read_text())
    overrides = [part for text in hostile for part in ("--set", text)]
    assert argv == ["generate", "my recipe's.yaml", *overrides, "--out", "runs"]
    assert (cwd, found) == (str(workdir), odd["ODD"])
    assert sorted(path.name for path in workdir.iterdir()) == ["said.json"]


def test_a_secret_must_be_there(tmp_path: Path) -> None:
    program(tmp_path, "potstill", "print('started')")
    script = render(config(launcher="torchrun", workdir=str(tmp_path), secrets=["POTSTILL_TEST_KEY"]))
    assert "POTSTILL_TEST_KEY: must be in the environment" in run(script, tmp_path).stderr
    assert run(script, tmp_path, POTSTILL_TEST_KEY=CANARY).stdout == "started\n"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_torchrun_on_this_machine_trains(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(PRETRAIN))
    given = config(
        launcher="torchrun", job="pretrain", recipe=str(recipe), out=str(tmp_path / "teacher"),
        workdir=str(REPOSITORY), gpus_per_node=0, processes_per_node=2, rendezvous_port=ports()["metrics_agent_port"],
        overrides=["layout.ep=2"], arguments=["--held-out", "1"],
        env={"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    result = run(render(given), tmp_path)
    assert result.returncode == 0, result.stderr[-2000:]
    assert json.loads((tmp_path / "teacher" / "training.json").read_text())["layout"]["ep"] == 2


SRUN = """
    import os, pathlib, subprocess, sys, time
    script = sys.argv[sys.argv.index("-c") + 1]
    count = int(os.environ["SLURM_NNODES"])
    tasks = [
        subprocess.Popen(["bash", "-c", script], env=os.environ | {"SLURM_NODEID": str(rank)}) for rank in range(count)
    ]
    killed = "--kill-on-bad-exit=1" in sys.argv
    if "TOLD" in os.environ:  # Slurm tells every task before the time limit
        while not all(pathlib.Path(f"up-{rank}").exists() for rank in range(count)):
            time.sleep(0.05)
        [task.terminate() for task in tasks]
    while all(task.poll() is None for task in tasks):
        time.sleep(0.05)
    if killed and any(task.poll() for task in tasks):
        [task.kill() for task in tasks]
    elif "TOLD" not in os.environ:  # --wait: the others do not outlive the first that ends
        [task.poll() is None and task.terminate() for task in tasks]
    sys.exit(max(abs(task.wait()) for task in tasks))
"""
SCONTROL = """
    import os, pathlib, sys
    if sys.argv[1:3] == ["show", "hostnames"]:
        print("node-a\\nnode-b")
    else:
        with pathlib.Path(os.environ["REQUEUED"]).open("a") as file:
            file.write(" ".join(sys.argv[1:]) + "\\n")
"""
POTSTILL = """
    import json, pathlib, signal, sys, time
    with pathlib.Path("calls.jsonl").open("a") as file:
        file.write(json.dumps(sys.argv[1:]) + "\\n")
    if sys.argv[1] == "generate":  # stopped the first time
        kept = pathlib.Path("kept")
        first = not kept.exists()
        kept.touch()
        time.sleep(0.5)
        sys.exit(75 if first else 0)
    signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path("served").open("a").write("x"), sys.exit(0)))
    time.sleep(60)
    sys.exit(9)
"""


def test_a_slurm_job_is_queued_again_until_it_is_done(tmp_path: Path) -> None:
    """Slurm's programs stand in for themselves: the script's nodes are processes here."""
    for name, body in (("srun", SRUN), ("scontrol", SCONTROL), ("potstill", POTSTILL)):
        program(tmp_path, name, body)
    work = tmp_path / "work"
    work.mkdir()
    script = render(config(workdir=str(work)))
    slurm = {"SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "41"}
    for code in (75, 0):
        result = run(script, tmp_path, **slurm, REQUEUED=str(tmp_path / "requeued"))
        assert result.returncode == code, result.stderr
    assert (tmp_path / "requeued").read_text() == "requeue 41\n"
    calls = sorted(json.loads(line) for line in (work / "calls.jsonl").read_text().splitlines())
    assert [call[0] for call in calls] == ["generate", "generate", "serve", "serve"]
    assert all("teacher.head_address=node-a" in call for call in calls)
    assert all(call[-2:] == ["--node-rank", "1"] for call in calls[2:])
    assert (work / "served").read_text() == "xx"
    assert not list(work.glob(".launch-*"))


TORCHRUN = """
    import os, pathlib, signal, sys, time
    rank = int(os.environ["NODE_RANK"])
    signal.signal(signal.SIGTERM, lambda *_: (time.sleep(1.0 - rank), sys.exit(1)))
    pathlib.Path(f"up-{rank}").touch()
    time.sleep(60)
"""


def test_a_slow_first_node_is_queued_again_too(tmp_path: Path) -> None:
    """All nodes are told to stop; one is through before the first has kept what it has, and must not end it."""
    for name, body in (("srun", SRUN), ("scontrol", SCONTROL), ("torchrun", TORCHRUN)):
        program(tmp_path, name, body)
    script = render(config(workdir=str(tmp_path), job="pretrain"))
    slurm = {"SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_NNODES": "2", "SLURM_JOB_ID": "41", "TOLD": "1"}
    result = run(f"cd {tmp_path}\n{script}", tmp_path, **slurm, REQUEUED=str(tmp_path / "requeued"))
    assert result.returncode == 75, result.stderr
    assert (tmp_path / "requeued").read_text() == "requeue 41\n"


def test_a_node_that_is_stopped_says_so(tmp_path: Path) -> None:
    """SIGTERM goes on to the command; that it failed because of it is 75, whatever it said itself."""
    program(tmp_path, "potstill", "import pathlib, time; pathlib.Path('up').touch(); time.sleep(60)")
    script = render(config(launcher="torchrun", workdir=str(tmp_path)))
    outside = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    with subprocess.Popen(["bash", "-c", script], env=outside) as process:
        while not (tmp_path / "up").exists():
            assert process.poll() is None
        process.terminate()
        assert process.wait(30) == 75


def ports() -> dict[str, int]:
    """Free ones for a Ray node, which would guess."""
    names = ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port", "runtime_env_agent_port")
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in names]
        return {name: probe.getsockname()[1] for name, probe in zip(names, probes, strict=True)}


STARTER = f"""
    import json, os, subprocess, sys, time
    from pathlib import Path
    from ray.cluster_utils import Cluster
    settings = json.loads(sys.argv[1])
    head = {{"num_cpus": 0, "include_dashboard": False}} | settings[0]
    cluster = Cluster(initialize_head=True, head_node_args=head)
    for of_node in settings[1:]:
        cluster.add_node(num_cpus=1, **of_node)
    job = subprocess.Popen(
        [sys.executable, "{REPOSITORY}/pipelines/launch/ray_nodes.py", "--nodes", "2", sys.argv[2]],
        env=os.environ | {{"RAY_ADDRESS": cluster.address}},
    )
    if len(sys.argv) > 3:  # the job is stopped when all its nodes are up
        while job.poll() is None and not all(Path(f"{{sys.argv[3]}}-{{rank}}").exists() for rank in range(2)):
            time.sleep(0.1)
        job.terminate()
    code = job.wait()
    cluster.shutdown()
    sys.exit(code)
"""


def on_ray(script: str, *more: str) -> subprocess.CompletedProcess[str]:
    """The script as a job of a cluster of a head and two nodes."""
    pytest.importorskip("ray", reason="Ray is not installed")
    settings = json.dumps([ports() for _ in range(3)])
    command = [sys.executable, "-c", textwrap.dedent(STARTER), settings, textwrap.dedent(script), *more]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ray_runs_a_script_on_each_of_two_nodes(tmp_path: Path) -> None:
    script = f"""
        cd {tmp_path}
        echo "$NODE_RANK $HEAD" >>nodes
        if [ "$NODE_RANK" -eq 0 ]; then sleep 1; [ -e kept ] && exit 0; touch kept; exit 75; fi
        trap 'echo ended >>served; exit 0' TERM
        while :; do sleep 0.1; done
    """
    result = on_ray(script)
    assert result.returncode == 0, result.stderr[-3000:]
    assert [line.split()[0] for line in sorted((tmp_path / "nodes").read_text().splitlines())] == ["0", "0", "1", "1"]
    assert (tmp_path / "served").read_text() == "ended\n" * 2


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_ray_job_that_is_stopped_stops_its_nodes(tmp_path: Path) -> None:
    script = f"""
        cd {tmp_path}
        trap 'touch "ended-$NODE_RANK"; exit 75' TERM
        touch "up-$NODE_RANK"
        for _ in $(seq 300); do sleep 0.1; done
    """
    result = on_ray(script, str(tmp_path / "up"))
    assert result.returncode == 75, result.stderr[-3000:]
    assert sorted(path.name for path in tmp_path.glob("ended-*")) == ["ended-0", "ended-1"]
