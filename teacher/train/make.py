"""Make the model folder `teacher/pico` by `pico.yaml`: tokenizer, corpus, training, FP8 checkpoint, card."""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import jinja2
import torch
import torch.distributed
from tokenizers import Tokenizer

from distill.manifest import write_atomically
from distill.packing import Rows
from distill.problems.stream import pico_families, stream
from distill.progress import Progress
from distill.recipe import load_settings, parse
from distill.records import Sampling, TraceRequest
from distill.training.loop import LogRow
from distill.verify import extract_answer
from teacher.backends.native.opening import open_native
from teacher.model.checkpoint import save_checkpoint
from teacher.model.config import DeepseekV3Config
from teacher.model.counts import count_parameters
from teacher.model.initialise import initialise
from teacher.model.transformer import DeepseekV3
from teacher.parallel.groups import lost_peers
from teacher.parallel.meshes import opened_meshes
from teacher.parallel.pipeline.weights import save_parts
from teacher.train.config import PretrainConfig
from teacher.train.corpus import ASSISTANT, BOS, CHAT_TEMPLATE, EOS, PAD, USER, build_corpus, make_tokenizer
from teacher.train.pretrain import Pretraining
from teacher.train.spread import SpreadPretraining, draw_part

RECIPE = Path(__file__).with_name("pico.yaml")
CARD = Path(__file__).with_name("card.md.jinja")
TEMPERATURE = 0.6
MAX_TOKENS = 160
BATCH_SIZE = 64


def load_pretrain_config(path: Path = RECIPE, overrides: Iterable[str] = ()) -> PretrainConfig:
    return load_settings(PretrainConfig, path, overrides)


class Launch(NamedTuple):
    """This process among those that train together; `recipe` is the file that messages and the card name."""

    rank: int
    num_ranks: int
    local_rank: int
    init_method: str = "env://"
    recipe: Path = RECIPE


class Materials(NamedTuple):
    """The tokenizer, the text to learn, and the shape of the model that learns it."""

    tokenizer: Tokenizer
    rows: Rows
    architecture: DeepseekV3Config


def make_teacher(
    config: PretrainConfig,
    out_dir: Path,
    *,
    launch: Launch | None = None,
    num_workers: int = 1,
    held_out_per_family: int = 64,
    progress: Progress,
) -> Path:
    """Train the teacher and write its folder; an older folder is replaced when the new one is whole.

    With `launch` over the ranks of `config.layout`, each of which makes this call with its own: goes on from the newest
    checkpoint in `OUT_DIR.checkpoints`, whatever layout it was saved under. Raises RecipeError for a layout that does
    not fit, EnvironmentFault where a rank is lost.
    """
    command = "make pico-teacher"
    if launch is not None:
        layout, num_ranks, where = config.layout, launch.num_ranks, str(launch.recipe)
        unnamed = _architecture(config, dict.fromkeys((BOS, EOS, PAD), 0))
        layout.checked(num_ranks=num_ranks, rows_per_step=config.rows_per_step, model=unnamed, where=where)
        command = f"torchrun --nproc-per-node {num_ranks} -m potstill pretrain {where}"
    materials = _materials(config, num_workers=num_workers)
    staging = out_dir.with_name(f".{out_dir.name}.part")
    if launch is None:
        log = _train_in_one_process(config, materials, staging, progress)
    else:
        checkpoint_dir = out_dir.with_name(f"{out_dir.name}.checkpoints")
        log = _train_over_ranks(config, materials, staging, checkpoint_dir, launch, progress)
    if launch is None or launch.rank == 0:
        _complete(config, materials, log, staging, held_out_per_family=held_out_per_family, command=command)
        shutil.rmtree(out_dir, ignore_errors=True)
        staging.replace(out_dir)
    return out_dir


def _materials(config: PretrainConfig, *, num_workers: int) -> Materials:
    tokenizer = make_tokenizer(vocab_size=config.vocab_size, seed=config.seed)
    rows = build_corpus(
        tokenizer,
        num_problems=config.num_problems,
        facts_share=config.facts_share,
        row_length=config.row_length,
        seed=config.seed,
        num_workers=num_workers,
    )
    ids = {text: tokenizer.token_to_id(text) for text in (BOS, EOS, PAD)}
    return Materials(tokenizer, rows, _architecture(config, ids))


def _architecture(config: PretrainConfig, ids: dict[str, int]) -> DeepseekV3Config:
    special = {f"{name}_token_id": ids[text] for name, text in (("bos", BOS), ("eos", EOS), ("pad", PAD))}
    return parse(DeepseekV3Config, {"vocab_size": config.vocab_size, **config.architecture, **special}, where=RECIPE)


def _train_in_one_process(
    config: PretrainConfig, materials: Materials, staging: Path, progress: Progress
) -> list[LogRow]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(config.seed)
    torch.set_float32_matmul_precision("high")
    with torch.device(device):
        model = initialise(DeepseekV3(materials.architecture))
    run = Pretraining(model, materials.rows, config, device=device)
    run.run(progress)
    _empty(staging)
    save_checkpoint(model.cpu(), staging, fp8=True)
    return run.log


def _train_over_ranks(
    config: PretrainConfig,
    materials: Materials,
    staging: Path,
    checkpoint_dir: Path,
    launch: Launch,
    progress: Progress,
) -> list[LogRow]:
    device = torch.device("cuda", launch.local_rank) if torch.cuda.is_available() else torch.device("cpu")
    joined = opened_meshes(config.layout, rank=launch.rank, init_method=launch.init_method, device=device)
    with joined as meshes:
        part = draw_part(materials.architecture, meshes, seed=config.seed)
        run = SpreadPretraining(part, materials.rows, config, meshes, checkpoint_dir=checkpoint_dir)
        run.run(progress)
        if launch.rank == 0:
            _empty(staging)
        with lost_peers(meshes.world):  # nobody writes before the folder is there
            torch.distributed.barrier(group=meshes.world)
        save_parts(run.model, staging, meshes, fp8=True)
    return run.log


def _empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _complete(
    config: PretrainConfig,
    materials: Materials,
    log: list[LogRow],
    staging: Path,
    *,
    held_out_per_family: int,
    command: str,
) -> None:
    """Write tokenizer, record and card beside the staged weights."""
    save_tokenizer(materials.tokenizer, staging, materials.architecture)
    accuracy = held_out_accuracy(staging, per_family=held_out_per_family)
    hardware = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    record = {
        "hardware": hardware,
        "torch": torch.__version__,
        "recipe": config.what_is_learned(),
        "layout": config.layout.model_dump(mode="json"),
        "num_problems_in_corpus": config.num_problems,
        "held_out_pass@1": accuracy,
        "log": log,
    }
    write_atomically(staging / "training.json", json.dumps(record, indent=1) + "\n")
    card = _card(config, materials.architecture, log, accuracy, hardware, held_out_per_family, command)
    write_atomically(staging / "README.md", card)


def save_tokenizer(tokenizer: Tokenizer, folder: Path, architecture: DeepseekV3Config) -> None:
    """Tokenizer, chat template and generation defaults as a Hugging Face folder holds them."""
    from transformers import GenerationConfig, PreTrainedTokenizerFast

    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=[USER, ASSISTANT],
        model_max_length=architecture.max_position_embeddings,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    GenerationConfig(
        do_sample=True,
        temperature=TEMPERATURE,
        top_p=0.95,
        bos_token_id=architecture.bos_token_id,
        eos_token_id=architecture.eos_token_id,
        pad_token_id=architecture.pad_token_id,
    ).save_pretrained(folder)


def held_out_accuracy(folder: Path, *, per_family: int) -> dict[str, float]:
    """pass@1 per family at temperature 0.6 on held-out problems, one sample each, by the native engine."""
    requests = [
        TraceRequest(problem=problem, sample_index=0)
        for family, parameters in pico_families().items()
        for problem in itertools.islice(stream(family, parameters, seed=99, split="held_out"), per_family)
    ]
    sampling = Sampling(temperature=TEMPERATURE, top_p=1.0, max_tokens=MAX_TOKENS)
    right = dict.fromkeys(pico_families(), 0)
    with contextlib.closing(open_native(folder, batch_size=min(BATCH_SIZE, len(requests)))) as teacher:
        for done in teacher.generate(requests, sampling):
            problem = done.request.problem
            right[problem.source] += extract_answer(done.text) == problem.answer
    return {family: count / per_family for family, count in right.items()}


def _card(
    config: PretrainConfig,
    architecture: DeepseekV3Config,
    log: list[LogRow],
    accuracy: dict[str, float],
    hardware: str,
    per_family: int,
    command: str,
) -> str:
    template = jinja2.Template(CARD.read_text(encoding="utf-8"), keep_trailing_newline=True)
    return template.render(
        config=config,
        model=architecture,
        counts=count_parameters(architecture),
        last=log[-1],
        tokens=config.num_steps * config.rows_per_step * config.row_length,
        accuracy=accuracy,
        mean=sum(accuracy.values()) / len(accuracy),
        temperature=TEMPERATURE,
        hardware=hardware,
        per_family=per_family,
        command=command,
        num_devices=config.layout.num_ranks,
    )
