"""A checkpoint folder as a native backend: its weights, tokenizer and end tokens checked, its engine made and warm."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from distill.errors import CheckpointError
from distill.model_folder import check_model_folder
from distill.progress import Progress, silent
from distill.recipe import UNINSTRUCTED, BatchSize, Instruction
from teacher.backends.native.backend import NativeBackend
from teacher.backends.native.fleet import Fleet
from teacher.backends.native.workers import EngineSettings
from teacher.backends.tokenizer import check_instruction, end_tokens, load_tokenizer
from teacher.engine.batch_size import CPU_BATCH_SIZE, fitting_batch_size
from teacher.engine.detokenizer import decode_by
from teacher.engine.engine import Engine
from teacher.models.load import ModelFacts, check_weights, load_model, read_facts

# Models up to this size generate in one process a core, each with a copy of the weights (FP32: 0.4 GB).
_WORKER_PARAMETERS = 100_000_000


def open_native(
    folder: Path,
    *,
    batch_size: BatchSize = "auto",
    on_cpu: int = CPU_BATCH_SIZE,
    speculate: bool = False,
    batch_invariant: bool = False,
    dtype: str | None = None,
    as_student: bool = False,
    instruction: Instruction = UNINSTRUCTED,
    over_ranks: Callable[[EngineSettings], Fleet] | None = None,
    progress: Progress | None = None,
) -> NativeBackend:
    """Load a checkpoint folder, of the teacher's architecture or of a student's (`teacher.models.load`).

    `batch_size` "auto" is what a GPU's memory allows (`fitting_batch_size`), and `on_cpu` elsewhere, ranks included. A
    student's kernels are compiled and its graphs captured here, which `progress` shows.

    `as_student`: it is there to be scored, bases included. It needs no chat template, and a prompt that fills its
    positions is an answer that ended by length, no fault. `over_ranks` opens the engine elsewhere than here. Raises
    what that raises, CheckpointError for anything wrong with weights, config or tokenizer, and with `speculate` for a
    model that has no MTP layer; RecipeError for a system prompt that the chat template has no place for, UserInputError
    for `batch_invariant` and `dtype` (torch's name) where they are not for.
    """
    facts, tokenizer, eos_token_ids = _read_folder(folder, speculate=speculate, as_student=as_student)
    check_instruction(tokenizer, instruction, folder)
    kind: dict[str, Any] = {"as_student": as_student, "instruction": instruction}
    if over_ranks is not None:
        spelled = tokenizer.backend_tokenizer.to_str()
        of_rank = on_cpu if batch_size == "auto" else batch_size
        fleet = over_ranks(EngineSettings(folder, of_rank, frozenset(eos_token_ids), tokenizer=spelled))
        return NativeBackend(folder, tokenizer, fleet, **kind)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    small = device.type == "cpu" and facts.num_parameters <= _WORKER_PARAMETERS
    decode = decode_by(tokenizer.backend_tokenizer)
    how = {"with_mtp": speculate, "batch_invariant": batch_invariant}
    model = load_model(folder, device, dtype=None if dtype is None else getattr(torch, dtype), **how)
    if batch_size == "auto":
        batch_size = fitting_batch_size(model, facts.vocab_size, on_cpu=on_cpu)
    limits = {"batch_size": batch_size, "eos_token_ids": eos_token_ids}
    engine = Engine(model, **limits, speculate=speculate, decode=decode)
    _warm_up(engine, progress or silent())
    max_workers = torch.get_num_threads() if small else 1
    return NativeBackend(folder, tokenizer, engine, max_workers=max_workers, **kind)


def _warm_up(engine: Engine, progress: Progress) -> None:
    graphs = engine.warm_up()
    if (left := next(graphs, 0)) > 0:
        with progress.task("compile kernels, capture graphs", total=left + 1, done=1, unit="graphs") as task:
            for _ in graphs:
                task.advance()


def check_native(
    folder: Path, *, speculate: bool = False, as_student: bool = False, instruction: Instruction = UNINSTRUCTED
) -> None:
    """Raise what `open_native` would find wrong in the folder. Reads every weight, keeps none."""
    _, tokenizer, _ = _read_folder(folder, speculate=speculate, as_student=as_student)
    check_instruction(tokenizer, instruction, folder)
    check_weights(folder)


def _read_folder(
    folder: Path, *, speculate: bool, as_student: bool
) -> tuple[ModelFacts, PreTrainedTokenizerBase, tuple[int, ...]]:
    """All but the weights: what config.json says, the tokenizer, the tokens that end an answer."""
    check_model_folder(folder)
    facts = read_facts(folder)
    if speculate and not facts.has_mtp:
        message = "speculation drafts with an MTP layer, and the model has none"
        raise CheckpointError(message, where=folder / "config.json", field="num_nextn_predict_layers")
    tokenizer = load_tokenizer(folder, facts, of_base=as_student)
    return facts, tokenizer, end_tokens(folder, tokenizer, facts)
