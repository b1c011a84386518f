"""Supervised fine-tuning of one student on traces, from a base folder to a checkpoint folder.

The same path trains 0.2M parameters on two cores and 70B under `accelerate launch` with FSDP2: TRL's SFTTrainer over
tokens prepared beforehand, loss on the completion alone, every example whole. What a run needs on its way lies in a
hidden folder beside the result; a run that was killed continues from its last whole checkpoint and ends with the same
weights. It does not pick data, verify answers or score the student.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerBase as Tokenizer, PrinterCallback
from transformers.utils import logging as transformers_logging
from trl import SFTConfig as TRLConfig

from distill.errors import DataError, EnvironmentFault, RecipeError, TrainingFailure
from distill.findings import Finding
from distill.manifest import hash_file, write_atomically
from distill.progress import Progress, silent
from distill.recipe import StudentConfig
from distill.records import content_id
from students import bases
from students.base_licence import copy_legal_texts
from students.bases import Method
from students.checkpoints import drop_incomplete, move_into_place, newest_complete
from students.preflight import check_counts, check_student, log_entry, stop_on_error
from students.tokens import TokenCounts, write_tokens
from students.trainer import CompletionTrainer, Reporter

LOG = "train_log.json"
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO, errno.EFBIG)
KEPT_CHECKPOINTS = 2  # the newest may be half written when the machine stops


@dataclass(frozen=True)
class FineTuningRun:
    """One training run and the folders that it uses."""

    student: StudentConfig
    method: Method
    examples_path: Path
    base: Path
    out_dir: Path
    seed: int

    @property
    def name(self) -> str:
        return f"{self.student.name}-{self.method}"

    @property
    def work_dir(self) -> Path:
        return self.out_dir.with_name(f".{self.out_dir.name}.work")

    def fingerprint(self, tokenizer: Tokenizer) -> str:
        """Hash of all that the resulting weights depend on, by content: a base that was copied or downloaded again is
        the same base. `tokenizer` has the template, padding and end of turn that are trained with."""
        spoken = [tokenizer.chat_template, tokenizer.pad_token, tokenizer.eos_token]
        inputs = [hash_file(self.examples_path), bases.identity(self.base), spoken]
        return content_id([self.student.identity(), self.method, self.seed, *inputs])


def train_student(
    student: StudentConfig,
    examples_path: str | Path,
    method: Method,
    out_dir: str | Path,
    *,
    seed: int = 17,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train `student` on the examples of a Parquet file and write the checkpoint folder `out_dir`; returns its log.

    `method` decides the chat template that the result carries: `distilled` opens `<think>` in the generation prompt,
    `direct` keeps the base's own. Run again after an interruption it continues; run again when it is finished it
    returns at once. Raises CheckpointError for the base, DataError for the examples, RecipeError for settings that do
    not fit the machine, TrainingFailure for a loss or gradient that is not finite, EnvironmentFault for memory.
    """
    progress = progress or silent()
    base = bases.resolve_base(student)
    bases.check_folder(base)
    job = FineTuningRun(student, method, Path(examples_path), base, Path(out_dir), seed)
    config = bases.open_config(base)
    tokenizer = bases.open_tokenizer(student, method, base)
    findings = check_student(student, method, config, tokenizer)
    stop_on_error(findings, base=base, examples_path=job.examples_path)
    _require_examples(job)
    fingerprint = job.fingerprint(tokenizer)
    finished = _read_finished(job.out_dir, fingerprint)
    if finished is not None:
        return finished
    args = arguments(student, job.work_dir, seed)
    counts = _tokens(job, fingerprint, tokenizer, args, progress)
    findings += check_counts(counts, student.sft)
    stop_on_error(findings, base=base, examples_path=job.examples_path)
    with quiet_transformers():
        return _train(job, fingerprint, tokenizer, args, counts, findings, progress)


def _train(
    job: FineTuningRun,
    fingerprint: str,
    tokenizer: Tokenizer,
    args: TRLConfig,
    counts: TokenCounts,
    findings: Sequence[Finding],
    progress: Progress,
) -> dict[str, Any]:
    dataset = Dataset.from_file(str(job.work_dir / "tokens.arrow"))
    with progress.task(f"load {job.name}", None):
        model = bases.open_model(job.student, job.base, tokenizer)
    trainer = CompletionTrainer(
        model=model,
        args=args,
        train_dataset=dataset,
        processing_class=tokenizer,
        lengths=dataset["length"],
        examples_a_step=job.student.sft.batch_size,
        where=job.name,
    )
    trainer.remove_callback(PrinterCallback)
    resume = newest_complete(job.work_dir)
    started = time.monotonic()
    with environment_faults(job.name):
        _run(trainer, job, resume, progress)
        log = _log(job, fingerprint, trainer, counts, findings, time.monotonic() - started, resume)
        _finish(job, trainer, tokenizer, log)
    return log


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Progress is reported through `Progress` alone: no bar of the library's beside it."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _require_examples(job: FineTuningRun) -> None:
    if not job.examples_path.is_file():
        raise DataError("no such file of examples", where=job.examples_path)


def _read_finished(out_dir: Path, fingerprint: str) -> dict[str, Any] | None:
    try:
        log = json.loads((out_dir / LOG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return log if isinstance(log, dict) and log.get("job") == fingerprint else None


def _prepare_work_dir(work_dir: Path, fingerprint: str) -> None:
    """Keep an interrupted run's folder if it is this very run's; start anew otherwise."""
    mark = work_dir / "job"
    if not mark.is_file() or mark.read_text(encoding="utf-8") != fingerprint:
        shutil.rmtree(work_dir, ignore_errors=True)
        write_atomically(mark, fingerprint)
    drop_incomplete(work_dir)


def _tokens(
    job: FineTuningRun, fingerprint: str, tokenizer: Tokenizer, args: TRLConfig, progress: Progress
) -> TokenCounts:
    """The main process makes the work folder and writes the tokens, the others wait and read the counts."""
    path = job.work_dir / "counts.json"
    with args.main_process_first(local=False):
        if args.process_index == 0:
            _prepare_work_dir(job.work_dir, fingerprint)
            arrow = job.work_dir / "tokens.arrow"
            counts = write_tokens(job.examples_path, tokenizer, job.student.sft, arrow, progress)
            write_atomically(path, json.dumps(asdict(counts)))
    return TokenCounts.from_json(json.loads(path.read_text(encoding="utf-8")))


def arguments(student: StudentConfig, work_dir: Path, seed: int) -> TRLConfig:
    """The student's settings as TRL's. Raises RecipeError where the batch does not divide over the devices."""
    sft = student.sft
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    if torch.cuda.device_count() > num_processes == 1:
        raise EnvironmentFault(
            f"{torch.cuda.device_count()} GPUs and one process: use `accelerate launch`, or set CUDA_VISIBLE_DEVICES=0",
            where=student.name,
        )
    micro = min(sft.micro_batch_size, sft.batch_size)
    if sft.batch_size % (micro * num_processes):
        raise RecipeError(
            f"{sft.batch_size} examples do not divide over {num_processes} devices with sft.micro_batch_size={micro}",
            where=student.name,
            field="sft.batch_size",
        )
    cosine = sft.scheduler == "cosine_with_min_lr"
    return TRLConfig(
        output_dir=str(work_dir),
        seed=seed,
        data_seed=seed,
        learning_rate=sft.lr,
        num_train_epochs=sft.num_epochs,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=sft.batch_size // (micro * num_processes),
        lr_scheduler_type="constant_with_warmup" if sft.scheduler == "constant" else sft.scheduler,
        lr_scheduler_kwargs={"min_lr_rate": sft.min_lr_ratio} if cosine else None,
        warmup_steps=sft.warmup_ratio,
        weight_decay=sft.weight_decay,
        max_grad_norm=sft.max_grad_norm,
        optim="adamw_torch_fused",
        bf16=sft.dtype == "bfloat16",
        fp16=False,
        tf32=None,
        gradient_checkpointing=sft.gradient_checkpointing,
        # Lengths are checked and labels made before: TRL has nothing to prepare, and nothing to cut.
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        # Whole examples behind one another with positions that start anew: no padding, and no attention across.
        packing=False,
        padding_free=sft.packing,
        use_cpu=not torch.cuda.is_available(),
        ddp_backend="gloo" if num_processes > 1 and not torch.cuda.is_available() else None,
        dataloader_num_workers=0,
        dataloader_pin_memory=torch.cuda.is_available(),
        save_strategy="steps",
        save_steps=sft.save_steps,
        save_total_limit=KEPT_CHECKPOINTS,
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        include_num_input_tokens_seen="non_padding",
        report_to="none",
        push_to_hub=False,
        disable_tqdm=True,
        log_level="error",
    )


def _run(trainer: CompletionTrainer, job: FineTuningRun, resume: Path | None, progress: Progress) -> None:
    sft = job.student.sft
    num_steps = math.ceil(sft.num_epochs * math.ceil(len(trainer.train_dataset) / sft.batch_size))
    done = 0 if resume is None else int(resume.name.rpartition("-")[2])
    with progress.task(f"train {job.name}", num_steps, done=done, unit="steps") as task:
        trainer.add_callback(Reporter(task, trainer.buckets))
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))


@contextmanager
def environment_faults(where: str) -> Iterator[None]:
    """Translate what a library says of a full disk or of memory into EnvironmentFault (exit 3)."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError, SafetensorError, OSError) as exc:
        fault = _environment_fault(exc)
        if fault is None:
            raise
        raise EnvironmentFault(fault, where=where) from exc


def _environment_fault(exc: Exception) -> str | None:
    """Fault of the machine, if that is what a library's error says: torch and safetensors have no class for it."""
    text = str(exc)
    if isinstance(exc, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in text:
        return "out of memory; lower sft.micro_batch_size, or set sft.gradient_checkpointing"
    if getattr(exc, "errno", None) in DISK_ERRORS or any(f"os error {number}" in text for number in DISK_ERRORS):
        return "the disk is full or not writable; free it and run the same command again"
    if "PytorchStreamWriter" in text or "unexpected pos" in text:
        return "a checkpoint could not be written, the disk may be full; free it and run the same command again"
    return None


def _log(
    job: FineTuningRun,
    fingerprint: str,
    trainer: CompletionTrainer,
    counts: TokenCounts,
    findings: Sequence[Finding],
    seconds: float,
    resume: Path | None,
) -> dict[str, Any]:
    steps = [
        {"step": entry["step"], "loss": entry["loss"], "grad_norm": entry["grad_norm"], "lr": entry["learning_rate"]}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]
    if not steps:
        raise TrainingFailure("not one step was trained", where=job.name)
    first = 0 if resume is None else int(resume.name.rpartition("-")[2])
    share = (trainer.state.global_step - first) / trainer.state.global_step
    num_tokens = round(counts.num_tokens * job.student.sft.num_epochs)
    return {
        "job": fingerprint,
        "student": job.student.model_dump(mode="json"),
        "method": job.method,
        "seed": job.seed,
        "num_processes": trainer.args.world_size,
        "num_examples": counts.num_examples,
        "num_tokens": num_tokens,
        "num_completion_tokens": round(counts.num_completion_tokens * job.student.sft.num_epochs),
        "num_dropped": counts.too_long.count,
        "num_dropped_tokens": counts.too_long.num_tokens,
        "num_steps": trainer.state.global_step,
        "resumed_at_step": first or None,
        "seconds": round(seconds, 3),
        "tokens_per_s": round(num_tokens * share / max(seconds, 1e-9), 1),
        "preflight": [log_entry(finding) for finding in findings],
        "steps": steps,
    }


def _finish(job: FineTuningRun, trainer: CompletionTrainer, tokenizer: Tokenizer, log: dict[str, Any]) -> None:
    """Write the finished checkpoint beside its place, and rename it there."""
    built = job.work_dir / "final"
    if trainer.args.should_save:
        shutil.rmtree(built, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    unwrapped = trainer.accelerator.unwrap_model(trainer.model)
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if trainer.args.should_save:
        dtype = job.student.sft.dtype
        # The cast makes two tensors of a tied one, and so does gathering shards: a head that is the embedding goes.
        tied = unwrapped.all_tied_weights_keys
        cast = {name: value.to(getattr(torch, dtype)) for name, value in state.items() if name not in tied}
        unwrapped.save_pretrained(built, state_dict=cast)
        config = json.loads((built / "config.json").read_text(encoding="utf-8"))
        write_atomically(built / "config.json", json.dumps({**config, "dtype": dtype}, indent=2) + "\n")
        tokenizer.save_pretrained(built)
        copy_legal_texts(job.student, job.base, built)
        write_atomically(built / LOG, json.dumps(log, indent=1) + "\n")
        move_into_place(built, job.out_dir)
        shutil.rmtree(job.work_dir, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
