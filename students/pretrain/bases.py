"""Make the model folders under `students/pico` by `pico.yaml`: one tokenizer and one corpus, four bases."""

from __future__ import annotations

import json
import shutil
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import yaml
from tokenizers import Tokenizer

from distill.errors import RecipeError, nearest
from distill.manifest import write_atomically
from distill.packing import Rows
from distill.progress import Progress, silent
from distill.recipe import parse
from students.pretrain.corpus import build_corpus, make_tokenizer
from students.pretrain.train import BasePretraining, BasesConfig, build_model, save_base

RECIPE = Path(__file__).with_name("pico.yaml")
CARD = Path(__file__).with_name("card.md.jinja")


def load_bases_config(path: Path = RECIPE, overrides: dict[str, Any] | None = None) -> BasesConfig:
    return parse(BasesConfig, {**yaml.safe_load(path.read_text(encoding="utf-8")), **(overrides or {})}, where=path)


def make_bases(
    config: BasesConfig, out_dir: Path, *, names: list[str] | None = None, num_workers: int = 1, progress: Progress
) -> list[Path]:
    """Train the named bases (all by default), `num_workers` side by side on one device; returns their folders."""
    names = names or list(config.bases)
    for name in names:
        if name not in config.bases:
            raise RecipeError(f"no base {name!r}; {nearest(name, config.bases)}", where=RECIPE, field="bases")
    tokenizer = make_tokenizer(vocab_size=config.vocab_size, seed=config.seed)
    rows = build_corpus(tokenizer, config.corpus, seed=config.seed, num_workers=num_workers * 4)
    with tempfile.TemporaryDirectory() as scratch:
        corpus = Path(scratch) / "rows.npy"
        np.save(corpus, rows.ids)
        arguments = [(name, config, tokenizer.to_str(), corpus, out_dir / name) for name in names]
        if num_workers == 1:
            return [_make_base(*argument, progress=progress) for argument in arguments]
        with ProcessPoolExecutor(num_workers, mp_context=get_context("spawn")) as pool:
            return list(pool.map(_make_base, *zip(*arguments, strict=True)))


def _make_base(
    name: str, config: BasesConfig, tokenizer_json: str, corpus: Path, out_dir: Path, progress: Progress | None = None
) -> Path:
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer, base = Tokenizer.from_str(tokenizer_json), config.bases[name]
    torch.manual_seed(config.seed)
    torch.set_float32_matmul_precision("high")
    model = build_model(base, tokenizer, config.vocab_size)
    pad_id = model.config.pad_token_id
    ids = np.load(corpus)
    rows = Rows(ids, ids != pad_id)
    run = BasePretraining(model, rows, base, config, pad_id=pad_id, device=device)
    run.run(progress or silent())
    log = run.log
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    staging = out_dir.with_name(f".{out_dir.name}.part")
    shutil.rmtree(staging, ignore_errors=True)
    save_base(model.cpu(), tokenizer, staging)
    write_atomically(staging / "pretrain.json", _record(name, config, log, model.num_parameters(), hardware))
    write_atomically(staging / "README.md", _card(name, config, log, model.num_parameters(), hardware))
    shutil.rmtree(out_dir, ignore_errors=True)
    staging.replace(out_dir)
    return out_dir


def _record(name: str, config: BasesConfig, log: list[dict[str, float]], num_parameters: int, hardware: str) -> str:
    record = {
        "name": name,
        "num_parameters": num_parameters,
        "hardware": hardware,
        "seconds": log[-1]["seconds"],
        "tokens": log[-1]["tokens"],
        "recipe": config.model_dump(mode="json"),
        "log": log[:: max(1, len(log) // 60)] + log[-1:],
    }
    return json.dumps(record, indent=1) + "\n"


def _card(name: str, config: BasesConfig, log: list[dict[str, float]], num_parameters: int, hardware: str) -> str:
    template = jinja2.Template(CARD.read_text(encoding="utf-8"), keep_trailing_newline=True)
    return template.render(
        name=name,
        base=config.bases[name],
        config=config,
        corpus=config.corpus,
        last=log[-1],
        num_parameters=num_parameters,
        hardware=hardware,
    )
