"""Multi-head latent attention (DeepSeek-V2 arXiv 2405.04434 s.2.1, V3 s.2.1.1) in the expanded form, for training.

Keys and values come from one latent of kv_lora_rank numbers a token and one rope key that all heads share. Generation
keeps only those two and works in the absorbed form: `teacher.engine`.

Shape legend: B sequences, T positions, H heads, D hidden, N nope, R rope, V value, C latent, d = N + R.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teacher.model.config import DeepseekV3Config
from teacher.model.norm import RMSNorm
from teacher.model.rope import rotate, softmax_scale

# DeepSeek's modelling code leaves the latents' norms at this value whatever rms_norm_eps says.
LATENT_NORM_EPS = 1e-6


class MLA(nn.Module):
    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__()
        self.config = config
        self.scale = softmax_scale(config)
        hidden, heads = config.hidden_size, config.num_attention_heads
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(hidden, heads * config.qk_head_dim, bias=False)
        else:
            self.q_a_proj = nn.Linear(hidden, config.q_lora_rank, bias=False)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, LATENT_NORM_EPS)
            self.q_b_proj = nn.Linear(config.q_lora_rank, heads * config.qk_head_dim, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, config.kv_lora_rank + config.qk_rope_head_dim, bias=False)
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank, LATENT_NORM_EPS)
        self.kv_b_proj = nn.Linear(
            config.kv_lora_rank, heads * (config.qk_nope_head_dim + config.v_head_dim), bias=False
        )
        self.o_proj = nn.Linear(heads * config.v_head_dim, hidden, bias=False)

    def forward(
        self, x_BTD: Tensor, rotation: tuple[Tensor, Tensor], attention_mask_B1TT: Tensor | None = None
    ) -> Tensor:
        """Causal attention over whole sequences. A mask (bool, True = may attend) replaces plain causality."""
        q_lora = self.config.q_lora_rank is not None
        q_latent = self.q_a_proj(x_BTD) if q_lora else self.q_proj(x_BTD)
        q_BHTd, k_BHTd, v_BHTV = self.expanded(q_latent, self.kv_a_proj_with_mqa(x_BTD), rotation)
        out_BHTV = F.scaled_dot_product_attention(
            q_BHTd,
            k_BHTd,
            v_BHTV,
            attn_mask=attention_mask_B1TT,
            is_causal=attention_mask_B1TT is None,
            scale=self.scale,
        )
        return self.o_proj(out_BHTV.transpose(1, 2).flatten(2))

    def expanded(
        self, q_latent: Tensor, kv_latent: Tensor, rotation: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys [B, H, T, N + R] and values [B, H, T, V] of all heads from what the down-projections give.

        Without low-rank queries `q_latent` are the queries before rotation. Training may do all this twice rather than
        keep its results (s.3.2.3).
        """
        config = self.config
        heads, nope, rope = config.num_attention_heads, config.qk_nope_head_dim, config.qk_rope_head_dim
        q = q_latent if config.q_lora_rank is None else self.q_b_proj(self.q_a_layernorm(q_latent))
        q_nope, q_rope = q.unflatten(-1, (heads, config.qk_head_dim)).split((nope, rope), dim=-1)
        latent, k_rope = kv_latent.split((config.kv_lora_rank, rope), dim=-1)
        kv = self.kv_b_proj(self.kv_a_layernorm(latent)).unflatten(-1, (heads, -1))
        k_nope, v_BTHV = kv.split((nope, config.v_head_dim), dim=-1)
        q_rope = rotate(q_rope, *rotation, interleave=config.rope_interleave)
        k_rope = rotate(k_rope.unsqueeze(2), *rotation, interleave=config.rope_interleave)
        q_BHTd = torch.cat((q_nope, q_rope), dim=-1).transpose(1, 2)
        k_BHTd = torch.cat((k_nope, k_rope.expand(-1, -1, heads, -1)), dim=-1).transpose(1, 2)
        return q_BHTd, k_BHTd, v_BTHV.transpose(1, 2)
