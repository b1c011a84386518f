"""Bodies of CUDA graphs: what is captured, from the static inputs to logits, tokens and drafts.

A body runs without the host: whatever depends on a number (which draft came true, where the next step's rows lie) is
decided by tensor operations, and nothing here may ask for a value.

Shape legend: B sequences, padding included; M rows, T = one or two of each; N rows that are sampled; D hidden,
V vocabulary.
"""

from __future__ import annotations

from enum import StrEnum

import torch
from torch import Tensor

from teacher.engine.architecture import Architecture, DraftingArchitecture
from teacher.engine.graph_inputs import COLUMNS, GraphInputs
from teacher.engine.graph_pool import GraphOutput
from teacher.engine.placeholders import resolve_placeholders
from teacher.engine.prompt_inputs import PromptShape
from teacher.engine.step import Decodes, Step
from teacher.kernels.attention.mla_cache import PAGE
from teacher.kernels.sampling.sample import Settings, draw


class End(StrEnum):
    """Kinds of graphs, by what they come to."""

    LOGITS = "logits"
    GREEDY = "greedy"  # tokens, all of temperature zero
    SAMPLED = "sampled"  # tokens, each by its sequence's sampling parameters
    DRAFT = "draft"  # logits of the draft layers, over what a graph that ended in logits has computed


class GraphBodies:
    """Computations of one model over one cache, from inputs that stay where they are.

    `draft_entries` are the draft layers' part of the cache; None: without drafts.
    """

    def __init__(
        self, model: Architecture, inputs: GraphInputs, entries_LPSE: Tensor, draft_entries_LPSE: Tensor | None
    ) -> None:
        self._model = model
        self._inputs = inputs
        self._entries_LPSE = entries_LPSE
        self._draft_entries_LPSE = draft_entries_LPSE

    def decode(self, size: int, end: End) -> GraphOutput:
        """Compute one step of `size` decoding sequences, one row each, or two where there are drafts."""
        # Phase 1: the forward pass. Placeholders become the tokens of the step before, which never left the device.
        step = self._decode_step(size)
        behind_B = self._inputs.carried.behind_B[:size]
        hidden_MD = self._model.hidden(step, self._entries_LPSE)
        logits_MV = self._model.logits(hidden_MD)
        if end == End.LOGITS:
            return GraphOutput(hidden_MD, logits_MV)
        uniform_BU = self._inputs.sampling_B8[:size, COLUMNS.uniform]
        if self._inputs.num_queries == 1:
            return GraphOutput(hidden_MD, self._sample(logits_MV, uniform_BU[:, :1], size, end))
        # Phase 2: sample behind both rows, with the uniform numbers that the host would use if it knew how many tokens
        # the step before has written.
        numbers_B3 = behind_B[:, None] + torch.arange(3, device=uniform_BU.device)
        uniform_B3 = uniform_BU.gather(1, numbers_B3)
        tokens_M = self._sample(logits_MV, uniform_B3[:, :2].reshape(-1, 1), size, end)
        # Phase 3: judge the drafts, and make the next ones behind the last row that holds.
        accepted_B = tokens_M[::2] == step.token_ids_M[1::2]
        rows_B = 2 * torch.arange(size, device=tokens_M.device) + accepted_B
        draft_logits_BV = self._draft_logits(step, hidden_MD, tokens_M, rows_B)
        uniform_B1 = torch.where(accepted_B[:, None], uniform_B3[:, 2:], uniform_B3[:, 1:2])
        drafts_B = self._sample(draft_logits_BV, uniform_B1, size, end)
        # Phase 4: leave the next step's inputs where this step found its own.
        self._carry_over(tokens_M[rows_B], drafts_B, accepted_B)
        return GraphOutput(hidden_MD, torch.cat((tokens_M, drafts_B)))

    def draft(self, size: int, hidden_MD: Tensor) -> GraphOutput:
        """Compute the draft layers over the hidden states of a graph of this size that ended in logits."""
        step = self._decode_step(size)
        inputs = self._inputs
        next_ids_M, rows_B = inputs.next_ids_M[: size * inputs.num_queries], inputs.draft_rows_B[:size]
        return GraphOutput(hidden_MD, self._draft_logits(step, hidden_MD, next_ids_M, rows_B))

    def read(self, num_rows: int, end: End) -> GraphOutput:
        """Read a short prompt as one sequence of many rows, sample the token behind it, and draft the one after."""
        inputs = self._inputs
        token_ids_M, padded_end_B = inputs.prompt_M[:num_rows], inputs.prompt_start + num_rows
        step = self._step(token_ids_M, padded_end_B, inputs.prompt_end, num_rows)
        hidden_MD = self._model.hidden(step, self._entries_LPSE)
        last_B = (inputs.prompt_end - inputs.prompt_start - 1).long()
        uniform_BU = inputs.sampling_B8[:1, COLUMNS.uniform]
        tokens_B = self._sample(self._model.logits(hidden_MD[last_B]), uniform_BU[:, :1], 1, end)
        if inputs.num_queries == 1:
            return GraphOutput(hidden_MD, tokens_B)
        next_ids_M = token_ids_M.roll(-1).index_copy(0, last_B, tokens_B)
        draft_logits_BV = self._draft_logits(step, hidden_MD, next_ids_M, last_B)
        drafts_B = self._sample(draft_logits_BV, uniform_BU[:, 1:2], 1, end)
        inputs.carried.lengths_B[:1] = inputs.prompt_end + 1
        self._carry_over(tokens_B, drafts_B, torch.zeros_like(tokens_B))
        return GraphOutput(hidden_MD, torch.cat((tokens_B, drafts_B)))

    def read_together(self, shape: PromptShape, end: End) -> GraphOutput:
        """Read several prompts, or pieces of them, in rows of their own, and sample the token behind each."""
        prompts = self._inputs.prompts
        assert prompts is not None
        packed = prompts.of(shape)
        step = Step(
            token_ids_M=packed.token_ids_R.long(),
            positions_M=packed.positions_R.long(),
            slots_M=packed.slots_R.long(),
            decodes=[],
            chunks=[],
            sampled=torch.empty(0, device=self._model.device),
            num_pages=0,
            packed=packed.queries,
        )
        hidden_MD = self._model.hidden(step, self._entries_LPSE)
        last_K = (packed.queries.spans_K3[:, 1].long() - 1).clamp(min=0)
        params_K8 = prompts.sampling_K8[: shape.num_prompts]
        tokens_K = self._draw(
            self._model.logits(hidden_MD[last_K]), params_K8[:, COLUMNS.uniform][:, :1], params_K8, end
        )
        return GraphOutput(hidden_MD, tokens_K)

    def _carry_over(self, last_B: Tensor, drafts_B: Tensor, accepted_B: Tensor) -> None:
        """Make the next step's inputs of what this one has found."""
        size = len(last_B)
        token_ids_BT, lengths_B, behind_B = (tensor[:size] for tensor in self._inputs.carried)
        torch.stack((last_B, drafts_B), dim=1, out=token_ids_BT)
        lengths_B += (1 + accepted_B) * (lengths_B > 0)  # padding stays
        behind_B.copy_(accepted_B)

    def _draft_logits(self, step: Step, hidden_MD: Tensor, next_ids_M: Tensor, rows_B: Tensor) -> Tensor:
        assert isinstance(self._model, DraftingArchitecture)
        assert self._draft_entries_LPSE is not None
        drafted_MD = self._model.draft_hidden(hidden_MD, next_ids_M, step, self._draft_entries_LPSE)
        return self._model.logits(drafted_MD[rows_B])

    def _sample(self, logits_NV: Tensor, uniform_N1: Tensor, size: int, end: End) -> Tensor:
        """Sample for one or two rows of each sequence."""
        params_N8 = self._inputs.sampling_B8[:size].repeat_interleave(len(logits_NV) // size, dim=0)
        return self._draw(logits_NV, uniform_N1, params_N8, end)

    def _draw(self, logits_NV: Tensor, uniform_N1: Tensor, params_N8: Tensor, end: End) -> Tensor:
        """Do as `sampler.choose`, without a look at the parameters' values."""
        best_N = logits_NV.argmax(dim=-1)
        if end == End.GREEDY:
            return best_N
        temperature_N1 = params_N8[:, COLUMNS.temperature]
        is_greedy_N1 = temperature_N1 == 0
        probabilities_NV = (logits_NV / torch.where(is_greedy_N1, 1.0, temperature_N1).float()).softmax(dim=-1)
        cuts = (params_N8[:, column] for column in (COLUMNS.top_p, COLUMNS.min_p, COLUMNS.top_k))
        return torch.where(is_greedy_N1[:, 0], best_N, draw(probabilities_NV, Settings(uniform_N1, *cuts)))

    def _decode_step(self, size: int) -> Step:
        token_ids_BT, lengths_B, _ = (tensor[:size] for tensor in self._inputs.carried)
        token_ids_M = resolve_placeholders(token_ids_BT.flatten(), self._inputs.before_Z)
        return self._step(token_ids_M, lengths_B, lengths_B, self._inputs.num_queries)

    def _step(self, token_ids_M: Tensor, lengths_B: Tensor, ends_B: Tensor, num_queries: int) -> Step:
        """Describe the last `num_queries` of `lengths` tokens of each; those from `ends` on are padding."""
        size = len(lengths_B)
        pages_BQ = self._inputs.pages_BQ[:size]
        positions_BT = (lengths_B[:, None] + torch.arange(-num_queries, 0, device=lengths_B.device)).clamp(min=0)
        slots_BT = pages_BQ.gather(1, positions_BT // PAGE) * PAGE + positions_BT % PAGE
        plan = self._model.plan_on_device(pages_BQ, lengths_B, num_queries)
        return Step(
            token_ids_M=token_ids_M,
            positions_M=positions_BT.flatten(),
            slots_M=torch.where(positions_BT < ends_B[:, None], slots_BT, -1).flatten(),
            decodes=[Decodes([[]] * size, [0] * size, num_queries, plan)],
            chunks=[],
            sampled=torch.empty(0, device=self._model.device),
            num_pages=0,
        )
