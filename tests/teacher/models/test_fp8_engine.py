"""The engine over FP8 weights: blocks go from the folder to the products as they are, and the twins give the model."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from distill.errors import CheckpointError
from teacher.engine.engine import Engine
from teacher.engine.sequence import Sequence
from teacher.model.block_checkpoint import load_blocks, unfit_for_fp8
from teacher.model.checkpoint import load_checkpoint, save_checkpoint
from teacher.model.config import DeepseekV3Config
from teacher.model.fp8 import BlockMatrix, dequantise_blocks, quantise_blocks
from teacher.model.names import is_quantised
from teacher.models.latent.model import LatentModel
from teacher.models.latent.weights import fuse_entries
from tests.teacher.v3_models import random_model, tiny_config

CPU = torch.device("cpu")
WIDE = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 128,
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
    "num_attention_heads": 4,
    "v_head_dim": 32,
}


@pytest.fixture(scope="module", params=[128, None], ids=["q_lora", "no q_lora"])
def config(request: pytest.FixtureRequest) -> DeepseekV3Config:
    rope = {} if request.param else {"qk_nope_head_dim": 24, "qk_rope_head_dim": 8}
    return tiny_config(**WIDE | {"q_lora_rank": request.param, "num_nextn_predict_layers": 1} | rope)


@pytest.fixture(scope="module")
def folder(config: DeepseekV3Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fp8")
    save_checkpoint(random_model(config, std=0.05).to(torch.bfloat16), path, fp8=True, max_shard_bytes=200_000)
    return path


def test_blocks_are_the_folder_s_own(folder: Path) -> None:
    config, entries = load_blocks(folder, CPU)
    model = load_checkpoint(folder, torch.bfloat16)
    assert entries.keys() == model.state_dict().keys()
    for name, wanted in model.state_dict().items():
        entry = entries[name]
        if isinstance(entry, BlockMatrix):
            matrices = zip(*entry, strict=True) if entry.values.dim() == 3 else [entry]
            entry = torch.stack([dequantise_blocks(*matrix) for matrix in matrices]).to(wanted.dtype).view_as(wanted)
        assert torch.equal(entry, wanted), name
    assert isinstance(entries[f"model.layers.{config.num_hidden_layers - 1}.mlp.experts.down_proj"], BlockMatrix)


def test_a_folder_in_bf16_is_quantised_on_the_way(config: DeepseekV3Config, tmp_path: Path) -> None:
    model = random_model(config, std=0.05).to(torch.bfloat16)
    save_checkpoint(model, tmp_path)
    _, found = load_blocks(tmp_path, CPU)
    assert found.keys() == model.state_dict().keys()
    for name, wanted in model.state_dict().items():
        is_stack = name.endswith(("experts.gate_up_proj", "experts.down_proj"))
        assert isinstance(found[name], BlockMatrix) == (is_stack or is_quantised(name, tuple(wanted.shape))), name
        if is_stack:
            got, wanted = list(zip(*found[name], strict=True)), list(wanted)
        else:
            got, wanted = [found[name]], [wanted]
        for entry, matrix in zip(got, wanted, strict=True):
            pairs = zip(entry, quantise_blocks(matrix), strict=True) if isinstance(entry, tuple) else [(entry, matrix)]
            assert all(torch.equal(a.float(), b.float()) for a, b in pairs), name


def test_fp8_products_give_the_model_s_logits(folder: Path) -> None:
    """E4M3 rounds by 2.6% (root mean square), in some dozen products one after another: a tenth of the logits' norm."""
    prompts = [[3, 4, 5, *range(10, 50)], [9, 8, 7]]
    logits = []
    for model in (LatentModel(fuse_entries(*load_blocks(folder, CPU))), LatentModel.of(load_checkpoint(folder))):
        engine = Engine(model, batch_size=2, eos_token_ids=(), num_pages=4, max_chunk=24)
        forward, seen = engine.runner.forward, []
        engine.runner.forward = lambda *given, f=forward, seen=seen: seen.append(f(*given)) or seen[-1]
        sequences = [Sequence(n, prompt, max_tokens=1, seed=0) for n, prompt in enumerate(prompts)]
        assert [s.fault for s in engine.run(sequences)] == [None, None]
        logits.append(torch.cat([step.logits_ZV for step in seen]))
    assert ((logits[0] - logits[1]).norm() / logits[1].norm()).item() < 0.12


def test_a_width_that_tiles_do_not_fill_is_named(tmp_path: Path) -> None:
    config = tiny_config(**WIDE | {"moe_intermediate_size": 96})
    assert unfit_for_fp8(config) == "moe_intermediate_size 96"
    save_checkpoint(random_model(config), tmp_path)
    with pytest.raises(CheckpointError, match=r"config\.json.*moe_intermediate_size 96"):
        load_blocks(tmp_path, CPU)


def test_a_value_that_is_no_number_is_named(folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    name = "model.layers.0.self_attn.o_proj.weight"
    file = broken / json.loads((broken / "model.safetensors.index.json").read_text())["weight_map"][name]
    tensors = load_file(file)
    tensors[name].view(torch.uint8)[3, 5] = 0xFF
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"not finite") as caught:
        load_blocks(broken, CPU)
    assert name in str(caught.value)
