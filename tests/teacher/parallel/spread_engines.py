"""Engines over ranks, what they are given to write, and the engine with all experts that they are compared with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from teacher.engine.engine import Engine
from teacher.engine.scheduler import Chunk
from teacher.engine.sequence import Sequence
from teacher.kernels.attention.mla_cache import PAGE
from teacher.model.block_checkpoint import load_blocks
from teacher.models.latent.model import LatentModel
from teacher.models.latent.weights import fuse_entries
from teacher.parallel.groups import Ranks
from teacher.parallel.serving import RanksInStep, SpreadModel, load_spread

BATCH, STEP = 3, 200
ENGINE: dict[str, Any] = {
    "batch_size": BATCH, "max_step_tokens": STEP, "num_pages": 20, "eos_token_ids": (), "prefix_caching": False
}  # fmt: skip
# Powers of two, as the kernels of a GPU take them.
WIDTHS = {
    "hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 128, "q_lora_rank": 128, "kv_lora_rank": 128,
    "num_attention_heads": 4, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 32,
    "max_position_embeddings": 512, "rope_scaling": None,
}  # fmt: skip
# Each rank's share of a token is rounded to BF16 (2^-9), and a half's attention may take its other form: either turns
# an E4M3 number behind it now and then (2^-4).
ROUNDING = 6e-2
# The difference of two logits whose errors are as large, as likely as not on either side, is beyond three of its own
# deviations once in some hundred ties.
TIE = 3 * 2**0.5


class Written(NamedTuple):
    """Tokens by key, and the logits behind the prompts that the first step reads."""

    texts: dict[int, list[int]]
    logits_ZV: torch.Tensor | None


def requests(rank: int) -> list[Sequence[int]]:
    """The first rank has more than a batch; the second none; the third one prompt, too long for the small inboxes."""
    lengths = [[5, 17, 40, 9, 1], [], [170], [3, 2]][rank]
    generator = torch.Generator().manual_seed(rank)
    prompts = [torch.randint(3, 64, (length,), generator=generator).tolist() for length in lengths]
    return [Sequence(n, prompt, max_tokens=4 + n, seed=n) for n, prompt in enumerate(prompts)]


def written(engine: Engine, sequences: list[Sequence[int]], after_step: Callable[[], None] = lambda: None) -> Written:
    forward, seen = engine.runner.forward, []
    engine.runner.forward = lambda *given: seen.append(forward(*given)) or seen[-1]
    run = engine.run(sequences, more=lambda: after_step() or ())
    texts = {done.key: done.generated_ids for done in run}
    engine.runner.forward = forward
    return Written(texts, seen[0].logits_ZV.cpu() if seen else None)


def spread_engine(
    ranks: Ranks, folder: Path, features: dict[str, bool] | None = None, **options: Any
) -> tuple[Engine, SpreadModel, RanksInStep]:
    """`features` are those of `Engine`, `options` those of `load_spread`."""
    model, lockstep = load_spread(folder, ranks, batch_size=BATCH, max_step_tokens=STEP, **options)
    return Engine(model, **ENGINE, **(features or {}), lockstep=lockstep), model, lockstep


def num_graphs(engine: Engine) -> int:
    """CUDA graphs that it has captured."""
    graphs = engine.runner.graphs
    return 0 if graphs is None else graphs.num_captured


def assert_one_engine_writes(turns_of_ranks: list[list[Written]], folder: Path, device: str) -> None:
    """What each rank wrote in turn n, of the requests of rank + n, is what one engine with all experts writes.

    But for near ties: where a text parts from the other, the one engine finds both tokens as likely as roundings tell.
    On a GPU all of an engine is rounded to BF16, which turns a choice of experts here and there: by how much that moves
    the one engine's logits shows beside its twins, in FP32 on the CPU.
    """
    alone = one_engine(folder, device)
    twins = one_engine(folder, "cpu") if device == "cuda" else None
    same = total = 0
    for rank, turns in enumerate(turns_of_ranks):
        for turn, (texts, logits_ZV) in enumerate(turns):
            number = (rank + turn) % 4
            wanted, wanted_logits_ZV = written(alone, requests(number))
            assert texts.keys() == wanted.keys()
            if wanted_logits_ZV is None:  # nothing was asked
                assert logits_ZV is None
                continue
            rounding = ROUNDING
            if twins is not None:
                rounding += distance(wanted_logits_ZV, written(twins, requests(number)).logits_ZV)
            assert distance(logits_ZV, wanted_logits_ZV) < rounding
            for sequence in requests(number):
                found, right = texts[sequence.key], wanted[sequence.key]
                assert len(found) == len(right)
                parting = next((n for n, (a, b) in enumerate(zip(found, right, strict=True)) if a != b), None)
                if parting is not None:
                    logits_V = logits_behind(alone, [*sequence.prompt_ids, *right[:parting]])
                    gap = (logits_V[right[parting]] - logits_V[found[parting]]) / logits_V.std()
                    assert gap < TIE * rounding
                same += found == right
                total += 1
    assert same >= total * (0.5 if device == "cuda" else 0.7)


def one_engine(folder: Path, device: str) -> Engine:
    return Engine(LatentModel(fuse_entries(*load_blocks(folder, torch.device(device)))), **ENGINE)


def distance(logits_ZV: torch.Tensor, wanted_ZV: torch.Tensor) -> float:
    """Of the wanted ones' norm."""
    return ((logits_ZV - wanted_ZV).norm() / wanted_ZV.norm()).item()


def logits_behind(engine: Engine, token_ids: list[int]) -> torch.Tensor:
    pages = list(range(-(-len(token_ids) // PAGE)))
    sequence = Sequence(0, token_ids, 1, 0, pages=pages)
    return engine.runner.forward([Chunk(sequence, len(token_ids))], []).logits_ZV[0].float()
