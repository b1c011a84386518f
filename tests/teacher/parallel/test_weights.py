"""Hugging Face folders over a layout: only what is a rank's own is read, and what is written is the whole model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from teacher.model.checkpoint import load_checkpoint, save_checkpoint
from teacher.model.config import DeepseekV3Config
from teacher.model.shards import stored_tensors, weight_files
from teacher.model.transformer import DeepseekV3
from teacher.parallel.groups import Ranks
from teacher.parallel.layout import Layout
from teacher.parallel.meshes import formed
from teacher.parallel.weights import load_part, save_parts
from tests.teacher.parallel.process_ranks import run_ranks
from tests.teacher.v3_models import random_model, tiny_config

LAYOUTS = [
    Layout(pp=2, ep=2),
    *(
        pytest.param(layout, marks=pytest.mark.slow)
        for layout in (Layout(ep=4), Layout(pp=2, schedule="zbv"), Layout(ep=2, dp=2))
    ),
]


def model(**changes) -> DeepseekV3:
    config: DeepseekV3Config = tiny_config(num_hidden_layers=4, **changes)
    return random_model(config)


def read_and_written(ranks: Ranks, layout: Layout, folder: Path, fp8: bool) -> tuple[tuple[str, ...], int, int]:
    meshes = formed(layout, ranks)
    part = load_part(folder, meshes)
    save_parts(part.model, folder.with_name("written"), meshes, fp8=fp8, dtype=torch.float32)
    held = sum(tensor.numel() for tensor in part.model.state_dict().values() if not tensor.is_meta)
    return part.names, part.num_bytes, held


@pytest.mark.timeout(120)
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"pp{layout.pp}-ep{layout.ep}-dp{layout.dp}")
def test_every_rank_reads_its_own_and_together_they_write_the_model(tmp_path, layout, fp8) -> None:
    save_checkpoint(model(), tmp_path / "given", fp8=fp8, dtype=torch.float32)
    results = run_ranks(read_and_written, layout.num_ranks, tmp_path / "ranks", layout, tmp_path / "given", fp8)
    given, written = load_checkpoint(tmp_path / "given"), load_checkpoint(tmp_path / "written")
    for name, tensor in given.state_dict().items():
        torch.testing.assert_close(written.state_dict()[name], tensor, atol=0, rtol=0, msg=name)
    stored = stored_tensors(tmp_path / "given")
    for rank, (names, num_bytes, held) in enumerate(results):
        own = layout.placement(8).of_rank(layout.coordinates(rank).ep)
        of_experts = [int(name.split(".experts.")[1].split(".")[0]) for name in names if ".experts." in name]
        assert set(of_experts) == set(own)
        assert num_bytes == sum(stored[name].num_bytes for name in names)
        assert held == sum(torch.Size(stored[n].shape).numel() for n in names if not n.endswith("_scale_inv"))
    read = {name for names, _, _ in results for name in names}
    assert {name for name in stored if name not in read} == {
        "model.layers.4.embed_tokens.weight", "model.layers.4.shared_head.head.weight",
    }  # fmt: skip


def read_alone(ranks: Ranks, layout: Layout, folder: Path) -> str:
    try:
        load_part(folder, formed(layout, ranks))
    except Exception as exc:  # noqa: BLE001 - reported to the test
        return str(exc)
    return "read"


def test_what_is_another_ranks_is_not_even_looked_at(tmp_path) -> None:
    """Expert 5 is spoiled with a NaN: only the rank that holds it can tell."""
    save_checkpoint(model(), tmp_path / "given", dtype=torch.float32)
    (file,) = weight_files(tmp_path / "given")
    tensors = load_file(file)
    spoiled = "model.layers.2.mlp.experts.5.down_proj.weight"
    tensors[spoiled][0, 0] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    outcomes = run_ranks(read_alone, 4, tmp_path / "ranks", Layout(ep=4), tmp_path / "given")
    assert [outcome == "read" for outcome in outcomes] == [True, True, False, True]
    assert f"{spoiled}: holds 1 values that are not finite" in outcomes[2]


def prompts(rank: int) -> torch.Tensor:
    """Ranks serve sequences of their own, and unlike numbers of them."""
    return torch.randint(0, 64, (1 + rank % 3, 5), generator=torch.Generator().manual_seed(rank))


@torch.inference_mode()
def greedy(model: DeepseekV3, ids: torch.Tensor) -> torch.Tensor:
    for _ in range(6):
        token = model(ids, with_mtp=False).logits_BTV[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat((ids, token), dim=1)
    return ids


def served(ranks: Ranks, layout: Layout, folder: Path) -> torch.Tensor:
    return greedy(load_part(folder, formed(layout, ranks), decode_tokens=40).model, prompts(ranks.rank))


def test_attention_by_rank_and_experts_over_ranks_serve_what_one_process_does(tmp_path) -> None:
    whole = model()
    save_checkpoint(whole, tmp_path / "given", dtype=torch.float32)
    layout = Layout(ep=4, dispatch="fp32", combine="fp32")
    for rank, ids in enumerate(run_ranks(served, 4, tmp_path / "ranks", layout, tmp_path / "given")):
        assert torch.equal(ids, greedy(whole.eval(), prompts(rank)))
