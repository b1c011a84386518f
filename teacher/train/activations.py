"""Activations that a layer's forward pass leaves for its backward pass, and their form (DeepSeek-V3 s.3.2.3, 3.3.3).

With `recompute`, the outputs of the decoder layers' norms and of MLA's up-projections are not kept, wherever their
consumers would keep them (the linear layers after a norm, attention for its queries, keys and values): in their place
stands where they come from, and the first to ask in the backward pass has them computed again, from the residual
stream or the latents, by the same operations. Gradients are the same to the last bit.

With `fp8`, the inputs of linear layers and what routed experts keep wait as E4M3 in tiles of 1x128, a quarter of FP32.
The forward pass does not change; gradients of weights see rounded inputs. What is computed again is not rounded, and
rows that 128 does not divide are kept as they are.

torch.utils.checkpoint cannot do the first: it drops what is saved within a region, while the outputs of a norm are
saved by those who use them. Here `torch.autograd.graph.saved_tensors_hooks` says for every tensor that any operation
saves what stands for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from teacher.kernels.quantise.quantise import quantise
from teacher.kernels.quantise.reference import Quantised
from teacher.model.experts import Experts
from teacher.model.fp8 import BLOCK
from teacher.model.layers import DecoderLayer
from teacher.model.mla import MLA
from teacher.parallel.exchange.moe import ExpertParallelExperts

Function = Callable[..., tuple[Tensor, ...]]


class RecomputedRegion:
    """A piece of the forward pass that can be done again: its function and what goes into it."""

    def __init__(self, function: Function, inputs: tuple[Tensor, ...]) -> None:
        self.function, self.inputs = function, inputs
        kind = inputs[0].device.type
        self._autocast = {
            "device_type": kind,
            "dtype": torch.get_autocast_dtype(kind),
            "enabled": torch.is_autocast_enabled(kind),
        }
        self._results: tuple[tuple[Tensor, ...], tuple[Tensor, ...]] | None = None

    def recompute(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """(inputs, outputs) with a graph of their own, computed once until `forget`."""
        if self._results is None:
            inputs = tuple(one.detach().requires_grad_(one.requires_grad) for one in self.inputs)
            with torch.enable_grad(), torch.autocast(**self._autocast):
                self._results = inputs, self.function(*inputs)
        return self._results

    def forget(self) -> None:
        self._results = None


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, region: RecomputedRegion, num_inputs: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        """`tensors` are the region's inputs, then the parameters that its function uses."""
        ctx.region, ctx.num_inputs = region, num_inputs
        ctx.parameters = tensors[num_inputs:]
        with torch.no_grad():
            return region.function(*region.inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        inputs, outputs = ctx.region.recompute()
        wanted = [one for one in (*inputs, *ctx.parameters) if one.requires_grad]
        found = iter(torch.autograd.grad(outputs, wanted, gradients, retain_graph=False))
        ctx.region.forget()
        return None, None, *(next(found) if one.requires_grad else None for one in (*inputs, *ctx.parameters))


class RecomputedView(NamedTuple):
    """Stands for a view of a region's output, perhaps in another dtype."""

    region: RecomputedRegion
    index: int
    dtype: torch.dtype
    geometry: tuple[torch.Size, tuple[int, ...], int]

    def tensor(self) -> Tensor:
        whole = self.region.recompute()[1][self.index].detach()
        # A cast is a tensor of its own, laid out like what it was made of.
        return torch.as_strided(whole.to(self.dtype), *self.geometry)


class FP8Activation(NamedTuple):
    quantised: Quantised
    dtype: torch.dtype
    shape: torch.Size

    def tensor(self) -> Tensor:
        tiles = self.quantised.values_MK.float().unflatten(1, (-1, BLOCK)) * self.quantised.scale_inv_MG.unsqueeze(-1)
        return tiles.to(self.dtype).view(self.shape)


class SavedActivations:
    """The switches over the decoder layers of some modules; made once, it holds for every later forward pass."""

    def __init__(self, modules: Iterable[nn.Module], *, recompute: bool, fp8: bool) -> None:
        self._recompute, self._fp8 = recompute, fp8
        # While one layer's forward pass runs: where each output that can be had again lies. Strong references, so that
        # no other tensor takes its place.
        self._known: dict[int, tuple[RecomputedRegion, int, Tensor]] = {}
        self._rounded: dict[tuple[int, int, int], tuple[Tensor, FP8Activation]] = {}
        self._input: Tensor | None = None
        self._in_experts = False
        layers = [layer for module in modules for layer in module.modules() if isinstance(layer, DecoderLayer)]
        for layer in layers if recompute or fp8 else []:
            self._watch(layer)

    def _watch(self, layer: DecoderLayer) -> None:
        layer.forward = partial(self._layer, layer.forward)
        for module in layer.modules():
            if isinstance(module, nn.Linear):
                module.register_forward_pre_hook(self._linear_begins)
                module.register_forward_hook(self._linear_ends)
            elif isinstance(module, (Experts, ExpertParallelExperts)):
                module.register_forward_pre_hook(partial(self._experts, True))
                module.register_forward_hook(lambda *_: self._experts(False))
        if self._recompute:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.forward = partial(self._norm, norm, norm.forward)
            layer.self_attn.expanded = partial(self._expanded, layer.self_attn, layer.self_attn.expanded)

    def _layer(self, forward: Callable[..., Any], *arguments: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*arguments)
        try:
            with saved_tensors_hooks(self._pack, _unpack):
                return forward(*arguments)
        finally:
            self._known.clear()
            self._rounded.clear()

    # --- what can be had again ----------------------------------------------------------------------------------------

    def _norm(self, norm: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        (out,) = self._recomputable(lambda given: (forward(given),), (x,), tuple(norm.parameters()))
        return out

    def _expanded(self, mla: MLA, expanded: Function, q_latent: Tensor, kv_latent: Tensor, rotation: Any) -> Any:
        used = ["q_a_layernorm", "q_b_proj", "kv_a_layernorm", "kv_b_proj"]
        parameters = tuple(p for name in used if hasattr(mla, name) for p in getattr(mla, name).parameters())
        return self._recomputable(lambda q, kv: expanded(q, kv, rotation), (q_latent, kv_latent), parameters)

    def _recomputable(
        self, function: Function, inputs: tuple[Tensor, ...], parameters: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        if not torch.is_grad_enabled():
            return function(*inputs)
        region = RecomputedRegion(function, tuple(one.detach().requires_grad_(one.requires_grad) for one in inputs))
        outputs = _Recomputed.apply(region, len(inputs), *inputs, *parameters)
        for index, out in enumerate(outputs):
            self._known[_place(out)] = region, index, out
        return outputs

    # --- linear layers and experts ------------------------------------------------------------------------------------

    def _linear_begins(self, module: nn.Linear, arguments: tuple[Tensor]) -> tuple[Tensor]:
        (x,) = arguments
        kind = x.device.type
        if torch.is_autocast_enabled(kind) and x.dtype != torch.get_autocast_dtype(kind):
            # What autocast would do unseen: the layer keeps the cast, which must be known for what it is.
            cast = x.to(torch.get_autocast_dtype(kind))
            if (known := self._known.get(_place(x))) is not None:
                self._known[_place(cast)] = known[0], known[1], cast
            x = cast
        self._input = x
        return (x,)

    def _linear_ends(self, *_: Any) -> None:
        self._input = None

    def _experts(self, inside: bool, *_: Any) -> None:
        self._in_experts = inside

    # --- what stands for a saved tensor -------------------------------------------------------------------------------

    def _pack(self, tensor: Tensor) -> Tensor | RecomputedView | FP8Activation:
        if not tensor.numel() or isinstance(tensor, nn.Parameter) or not tensor.is_floating_point():
            return tensor
        known = self._known.get(_place(tensor))
        if known is not None:
            region, index, _ = known
            return RecomputedView(region, index, tensor.dtype, (tensor.shape, tensor.stride(), tensor.storage_offset()))
        return self._rounded_form(tensor) if self._fp8 and self._may_round(tensor) else tensor

    def _may_round(self, tensor: Tensor) -> bool:
        if tensor.shape[-1] % BLOCK or not tensor.is_contiguous():
            return False
        if self._input is not None:
            return _place(tensor) == _place(self._input)
        # Of the experts everything but weights, which are leaves or views and casts of one with a gradient of its own.
        return self._in_experts and tensor.dim() == 2 and not _is_of_leaf(tensor)

    def _rounded_form(self, tensor: Tensor) -> FP8Activation:
        """Once a tensor, though several layers may keep it."""
        part = _place(tensor), tensor.storage_offset(), tensor.numel()
        if part not in self._rounded:
            form = FP8Activation(quantise(tensor.detach().flatten(0, -2)), tensor.dtype, tensor.shape)
            self._rounded[part] = tensor, form
        return self._rounded[part][1]._replace(shape=tensor.shape)


def _unpack(kept: Tensor | RecomputedView | FP8Activation) -> Tensor:
    return kept if isinstance(kept, Tensor) else kept.tensor()


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _is_of_leaf(tensor: Tensor) -> bool:
    """Tell whether a tensor is a parameter, or a view, a cast or a transposition of one alone."""
    node = tensor.grad_fn
    while node is not None:
        inputs = [one for one, _ in node.next_functions if one is not None]
        if len(inputs) != 1:
            return False
        node = inputs[0]
        if hasattr(node, "variable"):
            return True
    return tensor.is_leaf and tensor.requires_grad
