"""Hugging Face folders over a layout: what the ranks write together is the whole model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from teacher.model.checkpoint import load_checkpoint, save_checkpoint
from teacher.model.initialise import draw_entry
from teacher.model.names import empty_model
from teacher.model.transformer import DeepseekV3
from teacher.parallel.groups import Ranks
from teacher.parallel.layout import Layout
from teacher.parallel.meshes import form_meshes
from teacher.parallel.pipeline.stage import fill
from teacher.parallel.pipeline.weights import save_parts
from teacher.train.spread import draw_part
from tests.teacher.parallel.process_ranks import run_ranks
from tests.teacher.v3_models import tiny_config

LAYOUTS = [
    Layout(pp=2, ep=2),
    *(
        pytest.param(layout, marks=pytest.mark.slow)
        for layout in (Layout(ep=4), Layout(pp=2, schedule="zbv"), Layout(ep=2, dp=2))
    ),
]


CONFIG = tiny_config(num_hidden_layers=4)


def whole_model() -> DeepseekV3:
    """The model of which `draw_part` gives every rank its part."""
    model = empty_model(CONFIG)

    def value(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        experts = range(shape[0]) if ".experts." in name else None
        return draw_entry(name, shape, std=CONFIG.initializer_range, seed=3, experts=experts)

    fill(model, model.state_dict(), value)
    return model


def written(ranks: Ranks, layout: Layout, folder: Path, fp8: bool) -> int:
    meshes = form_meshes(layout, ranks)
    part = draw_part(CONFIG, meshes, seed=3)
    save_parts(part, folder, meshes, fp8=fp8, dtype=torch.float32)
    return sum(tensor.numel() for tensor in part.state_dict().values() if not tensor.is_meta)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"pp{layout.pp}-ep{layout.ep}-dp{layout.dp}")
def test_together_the_ranks_write_the_model(tmp_path, layout, fp8) -> None:
    whole = whole_model()
    save_checkpoint(whole, tmp_path / "given", fp8=fp8, dtype=torch.float32)
    held = run_ranks(written, layout.num_ranks, tmp_path / "ranks", layout, tmp_path / "written", fp8)
    given, together = load_checkpoint(tmp_path / "given"), load_checkpoint(tmp_path / "written")
    for name, tensor in given.state_dict().items():
        torch.testing.assert_close(together.state_dict()[name], tensor, atol=0, rtol=0, msg=name)
    if layout.pp * layout.ep > 1:  # no rank held all of it
        assert max(held) < sum(tensor.numel() for tensor in whole.state_dict().values())


def prompts(rank: int) -> torch.Tensor:
    """Ranks serve sequences of their own, and unlike numbers of them."""
    return torch.randint(0, 64, (1 + rank % 3, 5), generator=torch.Generator().manual_seed(rank))


@torch.inference_mode()
def greedy(model: DeepseekV3, ids: torch.Tensor) -> torch.Tensor:
    for _ in range(6):
        token = model(ids, with_mtp=False).logits_BTV[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat((ids, token), dim=1)
    return ids


def served(ranks: Ranks, layout: Layout) -> torch.Tensor:
    return greedy(draw_part(CONFIG, form_meshes(layout, ranks), seed=3).eval(), prompts(ranks.rank))


@pytest.mark.slow
def test_attention_by_rank_and_experts_over_ranks_serve_what_one_process_does(tmp_path) -> None:
    whole = whole_model().eval()
    layout = Layout(ep=4, dispatch="fp32", combine="fp32")
    for rank, ids in enumerate(run_ranks(served, 4, tmp_path / "ranks", layout)):
        assert torch.equal(ids, greedy(whole, prompts(rank)))
