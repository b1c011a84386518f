"""Checkpoint folders both ways, and every way in which one can be broken."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from distill.errors import CheckpointError
from teacher.model.checkpoint import check_checkpoint, convert_checkpoint, load_checkpoint, save_checkpoint
from teacher.model.config import parse_config, read_config
from teacher.model.fp8 import scale_shape
from tests.teacher.v3_models import random_model, tiny_config

IDS = torch.arange(24).view(2, 12)
NAME = "model.layers.1.mlp.experts.3.down_proj.weight"


def logits(model):
    with torch.no_grad():
        return model(IDS)


@pytest.mark.parametrize("q_lora_rank", [None, 20])
@pytest.mark.parametrize("max_shard_bytes", [10**9, 20_000])
def test_fp32_round_trip_is_exact(tmp_path, q_lora_rank, max_shard_bytes):
    model = random_model(tiny_config(q_lora_rank=q_lora_rank))
    save_checkpoint(model, tmp_path, dtype=torch.float32, max_shard_bytes=max_shard_bytes)
    loaded = load_checkpoint(tmp_path)
    assert loaded.config == model.config
    for (name, before), (_, after) in zip(model.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert torch.equal(before, after), name
    assert torch.equal(logits(model).mtp_logits_BTV, logits(loaded).mtp_logits_BTV)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (max_shard_bytes < 10**9)


def test_names_and_types_of_the_fp8_format(tmp_path):
    config = tiny_config(hidden_size=144, kv_lora_rank=140)  # ragged both ways
    save_checkpoint(random_model(config), tmp_path, fp8=True)
    tensors = load_file(tmp_path / "model.safetensors")
    tree = json.loads((tmp_path / "config.json").read_text())
    assert tree["quantization_config"]["weight_block_size"] == [128, 128]
    assert (tree["topk_method"], tree["scoring_func"]) == ("noaux_tc", "sigmoid")
    kv_a = tensors["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"]
    assert kv_a.dtype == torch.float8_e4m3fn
    scale = tensors["model.layers.0.self_attn.kv_a_proj_with_mqa.weight_scale_inv"]
    assert (scale.dtype, tuple(scale.shape)) == (torch.float32, scale_shape(kv_a.shape))
    assert tensors["model.layers.1.mlp.gate.e_score_correction_bias"].dtype == torch.float32
    unquantised = {name for name, t in tensors.items() if t.dtype == torch.bfloat16}
    for name in ("model.embed_tokens", "lm_head", "model.layers.3.eh_proj", "model.layers.3.shared_head.head"):
        assert name + ".weight" in unquantised
    assert "model.layers.1.mlp.gate.weight" in unquantised
    for name in ("embed_tokens", "enorm", "hnorm", "shared_head.norm"):
        assert f"model.layers.3.{name}.weight" in unquantised


def test_fp8_loads_within_its_rounding_and_resaves_to_the_same_bytes(tmp_path):
    model = random_model(tiny_config())
    save_checkpoint(model, tmp_path / "a", fp8=True)
    loaded = load_checkpoint(tmp_path / "a")
    for (name, before), (_, after) in zip(model.state_dict().items(), loaded.state_dict().items(), strict=True):
        # e4m3 rounds to 1/16 of a value, BF16 to 1/256
        torch.testing.assert_close(after, before, rtol=1 / 15, atol=2e-3, msg=name)
    save_checkpoint(loaded, tmp_path / "b", fp8=True)
    first, second = (load_file(tmp_path / folder / "model.safetensors") for folder in "ab")
    for name, tensor in first.items():
        torch.testing.assert_close(second[name].float(), tensor.float(), rtol=1e-6, atol=0, msg=name)


def test_bf16_copy_of_an_fp8_checkpoint_keeps_the_other_files(tmp_path):
    save_checkpoint(random_model(tiny_config()), tmp_path / "fp8", fp8=True)
    (tmp_path / "fp8" / "tokenizer.json").write_text("{}")
    convert_checkpoint(tmp_path / "fp8", tmp_path / "bf16")
    assert (tmp_path / "bf16" / "tokenizer.json").read_text() == "{}"
    assert "quantization_config" not in json.loads((tmp_path / "bf16" / "config.json").read_text())
    kept = load_checkpoint(tmp_path / "bf16").state_dict()
    for name, tensor in load_checkpoint(tmp_path / "fp8").state_dict().items():
        assert torch.equal(kept[name], tensor if "bias" in name else tensor.bfloat16().float()), name


def test_saving_again_leaves_no_shards_behind(tmp_path):
    save_checkpoint(random_model(tiny_config()), tmp_path, max_shard_bytes=20_000)
    other = random_model(tiny_config(), seed=5)
    save_checkpoint(other, tmp_path, dtype=torch.float32)
    assert [path.name for path in tmp_path.glob("*safetensors*")] == ["model.safetensors"]
    assert torch.equal(load_checkpoint(tmp_path).lm_head.weight, other.lm_head.weight)


# --- broken folders ---------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    save_checkpoint(random_model(tiny_config()), tmp_path, dtype=torch.float32)
    return tmp_path


@pytest.fixture
def sharded(tmp_path):
    save_checkpoint(random_model(tiny_config()), tmp_path, dtype=torch.float32, max_shard_bytes=20_000)
    return tmp_path


def edit_tensors(folder, change, file="model.safetensors"):
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file)


def edit_json(path, change):
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))


def refused(folder, *parts):
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(folder)
    message = str(caught.value)
    with pytest.raises(CheckpointError) as caught:
        check_checkpoint(folder)
    assert str(caught.value) == message
    assert "\n" not in message
    for part in parts:
        assert part in message
    return message


def test_missing_tensor(folder):
    edit_tensors(folder, lambda tensors: tensors.pop(NAME))
    refused(folder, "model.safetensors", NAME, "missing")


def test_unknown_tensor_names_the_nearest(folder):
    edit_tensors(folder, lambda tensors: tensors.update({NAME + "s": torch.zeros(2)}))
    refused(folder, "model.safetensors", NAME + "s", "unknown", f"did you mean {NAME!r}")


def test_wrong_shape(folder):
    edit_tensors(folder, lambda tensors: tensors.update({NAME: torch.zeros(3, 5)}))
    refused(folder, "model.safetensors", NAME, "[48, 24]", "[3, 5]")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(folder, value):
    edit_tensors(folder, lambda tensors: tensors[NAME].__setitem__((1, 1), value))
    refused(folder, "model.safetensors", NAME, "not finite")


def test_nan_scale_of_an_fp8_weight(tmp_path):
    save_checkpoint(random_model(tiny_config()), tmp_path, fp8=True)
    edit_tensors(tmp_path, lambda tensors: tensors[NAME + "_scale_inv"].fill_(float("nan")))
    refused(tmp_path, NAME + "_scale_inv", "not finite")


def test_fp8_weight_without_its_scale(tmp_path):
    save_checkpoint(random_model(tiny_config()), tmp_path, fp8=True)
    edit_tensors(tmp_path, lambda tensors: tensors.pop(NAME + "_scale_inv"))
    refused(tmp_path, NAME, "FP8 without")


def test_integer_weights(folder):
    edit_tensors(folder, lambda tensors: tensors.update({NAME: torch.zeros(48, 24, dtype=torch.int32)}))
    refused(folder, NAME, "I32")


def test_mtp_module_absent_says_what_to_do(folder):
    def drop(tensors):
        for name in [name for name in tensors if name.startswith("model.layers.3.")]:
            del tensors[name]

    edit_tensors(folder, drop)
    refused(folder, "missing", "num_nextn_predict_layers 0")
    edit_json(folder / "config.json", lambda tree: tree.update(num_nextn_predict_layers=0))
    assert logits(load_checkpoint(folder)).mtp_logits_BTV is None


def test_mtp_embedding_of_its_own(folder):
    edit_tensors(folder, lambda tensors: tensors["model.layers.3.embed_tokens.weight"].add_(1))
    refused(folder, "model.layers.3.embed_tokens.weight", "differs")


@pytest.mark.parametrize("kept", [0, 5, 8, 200, 0.5, -1])
def test_truncated_file(folder, kept):
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    path.write_bytes(raw[: int(len(raw) * kept) if isinstance(kept, float) else kept])
    refused(folder, "model.safetensors")


def test_duplicate_name_in_a_header(folder):
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = raw[8 : 8 + length]
    # Another tensor of the same type and shape takes NAME's name: the header then has it twice.
    doubled = header.replace(NAME.replace("experts.3", "experts.4").encode(), NAME.encode())
    path.write_bytes(raw[:8] + doubled + raw[8 + length :])
    assert refused(folder, NAME, "twice")


def test_missing_shard(sharded):
    victim = sorted(sharded.glob("model-*.safetensors"))[2]
    victim.unlink()
    refused(sharded, victim.name, "no such file")


def test_truncated_shard(sharded):
    victim = sorted(sharded.glob("model-*.safetensors"))[1]
    victim.write_bytes(victim.read_bytes()[:-10])
    refused(sharded, victim.name, "truncated")


@pytest.mark.parametrize("target", ["../outside.safetensors", "/etc/passwd", "a/../b.safetensors", "..", ""])
def test_index_that_points_outside(sharded, target):
    path = sharded / "model.safetensors.index.json"
    edit_json(path, lambda tree: tree["weight_map"].update({NAME: target}))
    refused(sharded, "model.safetensors.index.json", f"weight_map.{NAME}", "in this folder")


def test_index_that_names_the_wrong_shard(sharded):
    path = sharded / "model.safetensors.index.json"
    names = sorted(file.name for file in sharded.glob("model-*.safetensors"))
    edit_json(path, lambda tree: tree["weight_map"].update({"lm_head.weight": names[0]}))
    refused(sharded, "weight_map.lm_head.weight", names[0])


def test_tensor_in_two_shards(sharded):
    first, second = sorted(sharded.glob("model-*.safetensors"))[:2]
    name = next(iter(load_file(first)))
    edit_tensors(sharded, lambda tensors: tensors.update({name: load_file(first)[name]}), second.name)
    refused(sharded, name, "twice")


def test_tensor_that_the_index_does_not_name(sharded):
    first = min(sharded.glob("model-*.safetensors"))
    edit_tensors(sharded, lambda tensors: tensors.update({"extra": torch.zeros(1)}), first.name)
    refused(sharded, "extra", first.name)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"weight_map": 3}', '{"weight_map": {"a": 1}}'])
def test_index_that_is_not_one(sharded, text):
    (sharded / "model.safetensors.index.json").write_text(text)
    refused(sharded, "model.safetensors.index.json")


def test_nothing_there(tmp_path):
    refused(tmp_path / "nowhere", "config.json", "no such file")


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"hidden_size": "wide"}, ("hidden_size", "wide")),
        ({"hidden_size": 0}, ("hidden_size", "0")),
        ({"n_group": 3}, ("n_group 3",)),
        ({"num_experts_per_tok": 7}, ("num_experts_per_tok",)),
        ({"model_type": "llama"}, ("model_type", "llama")),
        ({"scoring_func": "softmax"}, ("scoring_func", "softmax")),
        ({"topk_method": "greedy"}, ("topk_method", "greedy")),
        ({"tie_word_embeddings": True}, ("tie_word_embeddings",)),
        ({"num_key_value_heads": 1}, ("num_key_value_heads",)),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, ("rope_scaling", "linear")),
        ({"rope_scaling": {"type": "yarn", "factor": 0.5, "original_max_position_embeddings": 4}}, ("factor", "0.5")),
        ({"quantization_config": {"quant_method": "awq"}}, ("quantization_config.quant_method", "awq")),
    ],
)
def test_config_errors_name_file_and_field(folder, change, parts):
    edit_json(folder / "config.json", lambda tree: tree.update(change))
    refused(folder, "config.json", *parts)


def test_missing_config_field(folder):
    edit_json(folder / "config.json", lambda tree: tree.pop("kv_lora_rank"))
    refused(folder, "config.json", "kv_lora_rank", "required")


def test_config_round_trip_and_both_rope_spellings(folder):
    config = read_config(folder)
    assert config == tiny_config()
    tree = config.to_json()
    scaling = tree.pop("rope_scaling")
    theta = tree.pop("rope_theta")
    tree["rope_parameters"] = {**scaling, "rope_type": scaling.pop("type"), "rope_theta": theta}
    assert parse_config(tree, "here") == config


def test_plain_rope_is_written_as_yarn_that_changes_nothing():
    config = tiny_config(rope_scaling=None)
    tree = config.to_json()
    assert tree["rope_scaling"]["factor"] == 1  # vLLM's CPU build rotates the plain form wrongly
    assert parse_config(tree, "here") == config
    assert parse_config(tree | {"rope_scaling": None}, "here") == config
