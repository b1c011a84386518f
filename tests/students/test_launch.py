"""Two processes (DDP over gloo) train the student that one process trains."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import yaml
from safetensors.torch import load_file
from torch.testing import assert_close

from students.sft import train_student
from tests.students.tiny_bases import make_base, make_examples, make_student


@pytest.mark.slow
def test_two_processes_train_what_one_trains(tmp_path):
    student = make_student(make_base(tmp_path / "base"), micro_batch_size=4)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(student.model_dump(mode="json", exclude_none=True)))
    examples = make_examples(tmp_path / "examples.parquet")
    # On a CPU `accelerate launch` starts one process whatever it is told; torchrun is what it uses elsewhere.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "students.launch", "--student", str(tmp_path / "tiny.yaml"), "--examples", str(examples)]
    command += ["--out", str(tmp_path / "two")]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": "."}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    log = train_student(student, examples, "distilled", tmp_path / "one")
    two = json.loads((tmp_path / "two" / "train_log.json").read_text())
    assert (log["num_processes"], two["num_processes"]) == (1, 2)
    assert two["num_steps"] == log["num_steps"]
    for ours, theirs in zip(log["steps"], two["steps"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)
    one = load_file(tmp_path / "one" / "model.safetensors")
    # The same sums in another order, through Adam.
    assert_close(load_file(tmp_path / "two" / "model.safetensors"), one, rtol=1e-2, atol=2e-3)


def test_a_fault_is_one_line_and_its_exit_code(tmp_path, capsys):
    from students.launch import main

    code = main(["--student", "qwen2-0.2", "--examples", "none.parquet", "--out", str(tmp_path / "out")])
    assert code == 2
    assert capsys.readouterr().err.startswith("students/zoo: no student 'qwen2-0.2' in the zoo; did you mean")


@pytest.mark.parametrize(("name", "kind"), [("ddp", "MULTI_GPU"), ("fsdp2", "FSDP")])
def test_the_launch_configs_are_accelerates(name, kind):
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.utils import FullyShardedDataParallelPlugin

    config = load_config_from_file(f"students/accelerate/{name}.yaml")
    assert (config.distributed_type.value, config.mixed_precision) == (kind, "bf16")
    if kind == "FSDP":
        assert config.fsdp_config["fsdp_version"] == 2
        known = set(FullyShardedDataParallelPlugin.__dataclass_fields__)
        known |= {"auto_wrap_policy", "offload_params"}  # the names under which the launcher passes these two
        assert [key for key in config.fsdp_config if not {key, key.removeprefix("fsdp_")} & known] == []
