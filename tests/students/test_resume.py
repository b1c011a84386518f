"""A run that was killed ends with the weights of a run that was not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
import yaml
from safetensors.torch import load_file

from students.checkpoints import COMPLETE, is_complete, mark_complete, newest_complete
from students.sft import train_student
from tests.students.tiny_bases import make_base, make_examples, make_student

# A child that trains and tells each step; it is killed from outside, or kills itself in the middle of a save.
CHILD = """
import os, signal, sys
from contextlib import contextmanager
from distill.recipe import load_student
from students import checkpoints, sft, trainer
student, examples, out, moment = sys.argv[1:]

class Task:
    step = 0
    def advance(self, amount=1, **facts):
        self.step += amount
        print("step", self.step, flush=True)

class Progress:
    @contextmanager
    def task(self, name, total, *, done=0, unit="it"):
        yield Task() if name.startswith("train") else type("Quiet", (), {"advance": lambda *a, **k: None})()

saves = []
def killed_while_saving(checkpoint):
    saves.append(checkpoint)
    if len(saves) == 3:
        (checkpoint / "optimizer.pt").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    checkpoints.mark_complete(checkpoint)

if moment == "save":
    trainer.mark_complete = killed_while_saving
sft.train_student(load_student(__import__("pathlib").Path(student)), examples, "distilled", out, progress=Progress())
"""


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    base = make_base(folder / "base", attention_dropout=0.1)  # dropout: the random state must survive as well
    student = make_student(base, save_steps=5, num_epochs=3)
    (folder / "tiny.yaml").write_text(yaml.safe_dump(student.model_dump(mode="json", exclude_none=True)))
    examples = make_examples(folder / "examples.parquet", 61)
    log = train_student(student, examples, "distilled", folder / "whole")
    return folder, student, examples, log


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["step", "save"])
def test_sigkill_and_again_gives_the_same_weights(setting, moment):
    folder, student, examples, log = setting
    out = folder / f"killed-{moment}"
    command = [sys.executable, "-c", CHILD, str(folder / "tiny.yaml"), str(examples), str(out), moment]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": "."}) as child:
        for line in child.stdout:
            if moment == "step" and line.split() == ["step", "13"]:
                child.send_signal(signal.SIGKILL)
    assert child.returncode == -signal.SIGKILL
    work = out.with_name(f".{out.name}.work")
    assert not out.exists()
    assert newest_complete(work).name == "checkpoint-10"  # step 13 lies in the second of three epochs
    resumed = train_student(student, examples, "distilled", out)
    assert resumed["resumed_at_step"] == 10
    assert [step["loss"] for step in resumed["steps"]] == [step["loss"] for step in log["steps"]]
    whole, again = load_file(folder / "whole" / "model.safetensors"), load_file(out / "model.safetensors")
    assert whole.keys() == again.keys()
    assert all(bool((whole[name] == again[name]).all()) for name in whole)
    assert not work.exists()


def test_only_whole_checkpoints_are_picked(tmp_path):
    for step in (5, 10, 20):
        checkpoint = tmp_path / f"checkpoint-{step}"
        checkpoint.mkdir()
        (checkpoint / "model.safetensors").write_bytes(b"x" * step)
        mark_complete(checkpoint)
    assert newest_complete(tmp_path).name == "checkpoint-20"
    (tmp_path / "checkpoint-20" / "model.safetensors").write_bytes(b"x" * 19)
    assert newest_complete(tmp_path).name == "checkpoint-10"
    (tmp_path / "checkpoint-10" / COMPLETE).write_text('{"model.saf')
    assert newest_complete(tmp_path).name == "checkpoint-5"
    (tmp_path / "checkpoint-5" / COMPLETE).unlink()
    assert newest_complete(tmp_path) is None
    assert not is_complete(tmp_path / "checkpoint-5")


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from distill.errors import PotstillError
from distill.recipe import load_student
from students.sft import train_student
student, examples, out = sys.argv[1:]
resource.setrlimit(resource.RLIMIT_FSIZE, (90_000, 90_000))  # the weights fit, the optimizer's state does not
try:
    train_student(load_student(Path(student)), examples, "distilled", out)
except PotstillError as exc:
    sys.exit(f"{exc.exit_code} {exc}")
"""


@pytest.mark.slow
def test_a_full_disk_is_exit_3_and_the_run_goes_on_afterwards(setting):
    folder, student, examples, _ = setting
    command = [sys.executable, "-c", FULL_DISK, str(folder / "tiny.yaml"), str(examples), str(folder / "full")]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": "."}, capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1].startswith("3 tiny-distilled: "), done.stderr
    assert "disk" in done.stderr.splitlines()[-1]
    assert not (folder / "full").exists()
    train_student(student, examples, "distilled", folder / "full")
    whole, again = load_file(folder / "whole" / "model.safetensors"), load_file(folder / "full" / "model.safetensors")
    assert all(bool((whole[name] == again[name]).all()) for name in whole)
