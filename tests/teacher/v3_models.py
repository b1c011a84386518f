"""Small V3 models with random weights for tests of this room."""

from pathlib import Path

import tokenizers
import torch
import transformers

from teacher.model.checkpoint import save_checkpoint
from teacher.model.config import DeepseekV3Config
from teacher.model.initialise import initialise
from teacher.model.transformer import DeepseekV3


def tiny_config(**changes) -> DeepseekV3Config:
    fields = {
        "vocab_size": 64,
        "hidden_size": 48,
        "intermediate_size": 40,
        "moe_intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "q_lora_rank": 20,
        "kv_lora_rank": 28,
        "qk_nope_head_dim": 12,
        "qk_rope_head_dim": 8,
        "v_head_dim": 10,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_group": 4,
        "topk_group": 2,
        "first_k_dense_replace": 1,
        "num_nextn_predict_layers": 1,
        "max_position_embeddings": 128,
        "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32},
    }
    return DeepseekV3Config.model_validate(fields | changes)


def random_model(config: DeepseekV3Config, *, seed: int = 0, std: float = 0.2) -> DeepseekV3:
    """Random weights, norms and biases included, large enough that every part shows in the logits."""
    generator = torch.Generator().manual_seed(seed)
    model = initialise(DeepseekV3(config), std=std, generator=generator)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "norm" in name:
                tensor.normal_(1.0, 0.2, generator=generator)
            elif "correction_bias" in name:
                tensor.normal_(0.0, 0.1, generator=generator)
    return model


def write_model_folder(folder: Path, config: DeepseekV3Config, *, fp8: bool = False, std: float = 0.2) -> DeepseekV3:
    """A whole teacher folder with random weights and a tokenizer of single characters; returns the model."""
    special = ["<|pad|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    characters = [chr(code) for code in range(32, 127)] + ["\n"]
    vocabulary = {token: index for index, token in enumerate(special + characters)}
    config = config.model_copy(update={"vocab_size": len(vocabulary), "eos_token_id": 2, "pad_token_id": 0})
    model = random_model(config, std=std)
    save_checkpoint(model, folder, fp8=fp8, dtype=torch.bfloat16 if fp8 else torch.float32)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=" "))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = tokenizers.decoders.Fuse()
    tokenizer.add_special_tokens(special[:3])
    tokenizer.add_tokens(special[3:])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=special[0], eos_token=special[2], clean_up_tokenization_spaces=False
    )
    fast.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    )
    fast.save_pretrained(folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": [2]}')
    return model
