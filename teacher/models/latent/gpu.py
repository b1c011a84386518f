"""A step's parts by the project's kernels (`teacher.kernels`), for a GPU.

Their tiles are powers of two wide. What a model of other widths, or a GPU without FP8, cannot run is computed by the
kernel's twin in plain torch: right, and slow.

Shape legend: as in `teacher.models.latent.operations`; Q pages a sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor

from teacher.engine.block_manager import num_pages_for
from teacher.engine.step import Decodes, PromptChunk, Step
from teacher.kernels.attention.mla_decode import mla_decode, mla_decode_twin, num_shares
from teacher.kernels.attention.mla_prefill import mla_prefill, mla_prefill_twin
from teacher.kernels.attention.mla_schedule import schedule_decode
from teacher.kernels.attention.reference import DecodeSchedule
from teacher.kernels.attention.rope_cache import rotate_queries, rotate_queries_twin, write_latent, write_latent_twin
from teacher.kernels.moe.route import route
from teacher.kernels.moe.route_reference import Routes
from teacher.model.mla import LATENT_NORM_EPS
from teacher.models.latent.weights import AttentionWeights, InferenceWeights, MoEWeights
from teacher.models.paged_plan import PagedPlan


class KernelOperations:
    extent = 1

    def __init__(self, weights: InferenceWeights) -> None:
        config = self._config = weights.config
        self._rotation = weights.cos, weights.sin
        self._latent = config.kv_lora_rank
        self._device = weights.embedding.device
        widths = config.kv_lora_rank, config.qk_rope_head_dim, config.qk_nope_head_dim, config.v_head_dim
        self._fits = all(_is_power_of_two(width) for width in widths) and min(widths) >= 16
        # A multiprocessor has no room for FP32 pages beside FP32 queries.
        roomy = not weights.embedding.is_cuda or weights.embedding.element_size() == 2
        self._decode_fits = self._fits and roomy
        self._routes = Routes.of(config)
        experts, groups = config.n_routed_experts, config.n_group
        self._routes_fit = _is_power_of_two(experts) and _is_power_of_two(groups) and experts >= 2 * groups

    @property
    def graphable(self) -> bool:
        return self._device.type == "cuda" and self._decode_fits and self._routes_fit

    def plan(self, decodes: Decodes) -> PagedPlan:
        return self.plan_on_device(*decodes.tables(self._device), decodes.num_queries)

    def plan_on_device(self, pages_BQ: Tensor, lengths_B: Tensor, num_queries: int) -> PagedPlan:
        return PagedPlan(pages_BQ, lengths_B, self._schedule(lengths_B, num_queries=num_queries))

    def rotate(self, query_MHD: Tensor, step: Step) -> None:
        apart = query_MHD.shape[-1] - self._config.qk_rope_head_dim
        turn = rotate_queries if self._fits else rotate_queries_twin
        interleave = self._config.rope_interleave
        turn(query_MHD, self._rotation, step.positions_M, latent=apart, interleave=interleave)

    def write(self, projected_ME: Tensor, weights: AttentionWeights, step: Step, cache_PSE: Tensor) -> None:
        put = write_latent if self._fits else write_latent_twin
        given = projected_ME, weights.kv_norm, LATENT_NORM_EPS, self._rotation, step.positions_M, step.slots_M
        put(*given, cache_PSE, interleave=self._config.rope_interleave)

    def decode(self, query_BTHE: Tensor, cache_PSE: Tensor, plan: PagedPlan) -> Tensor:
        return self._attend(query_BTHE, cache_PSE, plan)

    def absorbed(self, query_THE: Tensor, cache_PSE: Tensor, chunk: PromptChunk) -> Tensor:
        lengths_B = torch.tensor([chunk.context], dtype=torch.int32).to(self._device)
        pages_BQ = chunk.pages[None, : num_pages_for(chunk.context)].to(torch.int32)
        schedule = self._schedule(lengths_B, num_queries=chunk.num_queries)
        return self._attend(query_THE[None], cache_PSE, PagedPlan(pages_BQ, lengths_B, schedule))[0]

    def expanded(self, query_THD: Tensor, key_UHD: Tensor, value_UHV: Tensor) -> Tensor:
        attend = mla_prefill if self._fits else mla_prefill_twin
        return attend(query_THD[None], key_UHD[None], value_UHV[None], scale=1.0)[0]

    def route(self, x_MX: Tensor, weights: MoEWeights) -> tuple[Tensor, Tensor, Tensor]:
        if not self._routes_fit:
            indices_MK, gates_MK, _ = weights.router(x_MX)
            load_E = torch.bincount(indices_MK.flatten(), minlength=weights.down_EID.shape[0])
            return indices_MK, gates_MK, load_E.cumsum(0).to(torch.int32)
        logits_ME = torch.nn.functional.linear(x_MX.float(), weights.router.weight.float())
        choice = route(logits_ME, weights.router.e_score_correction_bias, self._routes)
        return choice.indices_NK, choice.weights_NK, choice.load_E.cumsum(0).to(torch.int32)

    def _schedule(self, lengths_B: Tensor, *, num_queries: int) -> DecodeSchedule | None:
        if not self._decode_fits:
            return None
        heads = self._config.num_attention_heads
        return schedule_decode(lengths_B, num_shares(self._device, num_queries, heads))

    def _attend(self, query_BTHE: Tensor, cache_PSE: Tensor, plan: PagedPlan) -> Tensor:
        given = query_BTHE, cache_PSE, plan.pages_BQ, plan.lengths_B
        if not self._decode_fits:
            return mla_decode_twin(*given, scale=1.0, latent=self._latent)
        return mla_decode(*given, scale=1.0, latent=self._latent, schedule=plan.schedule)


def _is_power_of_two(number: int) -> bool:
    return number & (number - 1) == 0
