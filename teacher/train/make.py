"""From `pico.yaml` to the model folder `teacher/pico`: tokenizer, corpus, training, FP8 checkpoint, card."""

from __future__ import annotations

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
from teacher.model.checkpoint import load_checkpoint, save_checkpoint
from teacher.model.config import DeepseekV3Config
from teacher.model.counts import count_parameters
from teacher.model.initialise import initialise
from teacher.model.transformer import DeepseekV3
from teacher.parallel.groups import lost_peers
from teacher.parallel.meshes import opened_meshes
from teacher.parallel.weights import save_parts
from teacher.train.config import PretrainConfig
from teacher.train.corpus import ASSISTANT, BOS, CHAT_TEMPLATE, EOS, PAD, USER, build_corpus, make_tokenizer
from teacher.train.pretrain import Pretraining
from teacher.train.sample import sampled_accuracy
from teacher.train.spread import SpreadPretraining, drawn_part

RECIPE = Path(__file__).with_name("pico.yaml")
CARD = Path(__file__).with_name("card.md.jinja")
BUNDLED = Path(__file__).parents[1] / "pico"
TEMPERATURE = 0.6
MAX_TOKENS = 160


def load_pretrain_config(path: Path = RECIPE, overrides: Iterable[str] = ()) -> PretrainConfig:
    return load_settings(PretrainConfig, path, overrides)


class Made(NamedTuple):
    """What comes before the first step: the text to learn, and the shape of the model that learns it."""

    tokenizer: Tokenizer
    rows: Rows
    architecture: DeepseekV3Config


def make_teacher(
    config: PretrainConfig, out_dir: Path, *, num_workers: int, held_out_per_family: int = 64, progress: Progress
) -> Path:
    """Train the teacher and write its folder; an older folder is replaced when the new one is whole."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    made = _made(config, num_workers=num_workers)
    torch.manual_seed(config.seed)
    torch.set_float32_matmul_precision("high")
    with torch.device(device):
        model = initialise(DeepseekV3(made.architecture))
    run = Pretraining(model, made.rows, config, device=device)
    run.run(progress)
    staging = _staging(out_dir)
    save_checkpoint(model.cpu(), staging, fp8=True)
    return _finished(config, made, run.log, out_dir, device=device, held_out_per_family=held_out_per_family)


def make_spread_teacher(
    config: PretrainConfig,
    out_dir: Path,
    *,
    rank: int,
    num_ranks: int,
    local_rank: int,
    init_method: str = "env://",
    where: Path = RECIPE,
    num_workers: int = 1,
    held_out_per_family: int = 64,
    progress: Progress,
) -> Path:
    """The same over the ranks of `config.layout`, each of which makes this call with its own number.

    Goes on from the newest checkpoint in `OUT_DIR.checkpoints`, whatever layout it was saved under. Raises RecipeError
    for a layout that does not fit, EnvironmentFault where a rank is lost.
    """
    architecture = _architecture(config, dict.fromkeys((BOS, EOS, PAD), 0))
    layout = config.layout.checked(
        num_ranks=num_ranks, rows_per_step=config.rows_per_step, model=architecture, where=str(where)
    )
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    made = _made(config, num_workers=num_workers)
    with opened_meshes(layout, rank=rank, init_method=init_method, device=device) as meshes:
        run = SpreadPretraining(
            drawn_part(made.architecture, meshes, seed=config.seed),
            made.rows,
            config,
            meshes,
            checkpoint_dir=out_dir.with_name(f"{out_dir.name}.checkpoints"),
        )
        run.run(progress)
        if rank == 0:
            _staging(out_dir)
        with lost_peers(meshes.world):
            torch.distributed.barrier(group=meshes.world)
        save_parts(run.model, out_dir.with_name(f".{out_dir.name}.part"), meshes, fp8=True)
    if rank:
        return out_dir
    return _finished(config, made, run.log, out_dir, device=device, held_out_per_family=held_out_per_family)


def _made(config: PretrainConfig, *, num_workers: int) -> Made:
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
    return Made(tokenizer, rows, _architecture(config, ids))


def _architecture(config: PretrainConfig, ids: dict[str, int]) -> DeepseekV3Config:
    special = {f"{name}_token_id": ids[text] for name, text in (("bos", BOS), ("eos", EOS), ("pad", PAD))}
    return parse(DeepseekV3Config, {"vocab_size": config.vocab_size, **config.architecture, **special}, where=RECIPE)


def _staging(out_dir: Path) -> Path:
    """An empty folder in which the new teacher comes together."""
    staging = out_dir.with_name(f".{out_dir.name}.part")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    return staging


def _finished(
    config: PretrainConfig,
    made: Made,
    log: list[dict[str, float]],
    out_dir: Path,
    *,
    device: torch.device,
    held_out_per_family: int,
) -> Path:
    """Beside the staged weights: tokenizer, record and card; then the folder gets its name."""
    staging = out_dir.with_name(f".{out_dir.name}.part")
    save_tokenizer(made.tokenizer, staging, made.architecture)
    shipped = load_checkpoint(staging).to(device)
    accuracy = held_out_accuracy(shipped, made.tokenizer, per_family=held_out_per_family, device=device)
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
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
    card = _card(config, made.architecture, log, accuracy, hardware, held_out_per_family)
    write_atomically(staging / "README.md", card)
    shutil.rmtree(out_dir, ignore_errors=True)
    staging.replace(out_dir)
    return out_dir


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


def held_out_accuracy(
    model: DeepseekV3, tokenizer: Tokenizer, *, per_family: int, device: torch.device
) -> dict[str, float]:
    """pass@1 per family at temperature 0.6 on held-out problems, one sample each."""
    problems = [
        problem
        for family, parameters in pico_families().items()
        for problem in itertools.islice(stream(family, parameters, seed=99, split="held_out"), per_family)
    ]
    return sampled_accuracy(
        lambda ids: model(ids, experts="dense", with_mtp=False).logits_BTV,
        tokenizer,
        problems,
        [f"{BOS}{USER}{problem.prompt}{ASSISTANT}<think>\n" for problem in problems],
        eos_id=tokenizer.token_to_id(EOS),
        temperature=TEMPERATURE,
        max_tokens=MAX_TOKENS,
        device=device,
    )


def _card(
    config: PretrainConfig,
    architecture: DeepseekV3Config,
    log: list[dict[str, float]],
    accuracy: dict[str, float],
    hardware: str,
    per_family: int,
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
    )
