"""AdamW whose states are shared out among the replicas of what they belong to: ZeRO-1 (arXiv 1910.02054 s.5.1).

Parameters and gradients stay whole on every replica, moments do not: a replica gets the sum of the gradients for its
part of each tensor, updates that part, and sends it to the others. DeepSeek-V3 trains so (arXiv 2412.19437 s.3.2).
FSDP2 would also share out the parameters, and gather them again for every micro-batch of every pipeline stage; with
experts and stages spread already, they are the smaller part.

Replicas of the dense part are all ranks of a stage, those of an expert the ranks with the same experts. A tensor counts
as rows and columns: a dense one as a single row, a stack of experts as a row an expert; columns are cut among the
replicas, as evenly as they go. A part of a parameter is a view of it, so the only thing held besides is the moments.

A tensor that two stages hold (the embedding, for MTP) is summed over both, part by part, and both do the same update.

Shape legend: R replicas, F columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from teacher.parallel.groups import all_gather, all_reduce_sum, reduce_scatter
from teacher.parallel.meshes import Meshes

EPS = 1e-8
BUCKET_BYTES = 256 << 20  # of gradients that travel together


@dataclass
class ParameterShard:
    """This replica's columns of one parameter, with their moments. Columns are cut into runs of `chunk`."""

    name: str
    parameter: nn.Parameter
    is_expert: bool
    chunk: int
    own: slice
    exp_avg: Tensor
    exp_avg_sq: Tensor

    @property
    def num_rows(self) -> int:
        return self.parameter.shape[0] if self.is_expert else 1

    @property
    def num_columns(self) -> int:
        return self.parameter.numel() // self.num_rows

    def matrix(self, tensor: Tensor) -> Tensor:
        return tensor.detach().view(self.num_rows, -1)

    @property
    def weight(self) -> Tensor:
        return self.matrix(self.parameter)[:, self.own]


class ZeroAdamW:
    """One optimizer over the parameters that a rank holds, by their names. A step is collective.

    `moments` is their dtype; arithmetic is FP32 in any case. Matrices decay by `weight_decay`, vectors do not.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        meshes: Meshes,
        *,
        betas: tuple[float, float],
        weight_decay: float,
        moments: torch.dtype = torch.float32,
        shared: str | None = None,
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        self.meshes, self.betas, self.weight_decay, self.shared = meshes, betas, weight_decay, shared
        self.parts = [self._part(name, parameter, moments) for name, parameter in parameters.items()]
        self._buckets = list(_buckets(self.parts, bucket_bytes))

    def _part(self, name: str, parameter: nn.Parameter, moments: torch.dtype) -> ParameterShard:
        at, layout = self.meshes.at, self.meshes.layout
        is_expert = ".experts." in name
        replica, num_replicas = (at.dp, layout.dp) if is_expert else (self.meshes.replica, layout.num_replicas)
        rows = parameter.shape[0] if is_expert else 1
        columns = parameter.numel() // rows
        chunk = -(-columns // num_replicas)  # torch.chunk's sizes, which are DTensor's too
        own = slice(min(replica * chunk, columns), min((replica + 1) * chunk, columns))
        zeros = [torch.zeros(rows, own.stop - own.start, dtype=moments, device=parameter.device) for _ in range(2)]
        return ParameterShard(name, parameter, is_expert, chunk, own, *zeros)

    def _group(self, part: ParameterShard) -> dist.ProcessGroup:
        return self.meshes.copies if part.is_expert else self.meshes.replicas

    @torch.no_grad()
    def step(self, *, step: int, lr: float, max_norm: float, sums: Tensor) -> tuple[float, Tensor]:
        """Update by the gradients, then drop them. `step` counts from 0; gradients are clipped to a global norm.

        `sums` [n] are added up over all ranks on the way. Returns (the norm before clipping, the sums).
        Raises EnvironmentFault where a rank is lost.
        """
        gradients = [self._reduce_gradients(bucket) for bucket in self._buckets]
        self._join_ends(gradients)
        squares = torch.zeros(1, dtype=torch.float64, device=self.meshes.device)
        for part, gradient in self._pairs(gradients):
            if not (part.name == self.shared and self._is_second_end):  # the same numbers as on the first one
                squares += gradient.double().square().sum()
        total = all_reduce_sum(torch.cat((squares, sums.double())), self.meshes.world)
        norm = math.sqrt(float(total[0]))
        factor = min(1.0, max_norm / (norm + 1e-6))  # torch.nn.utils.clip_grad_norm_'s
        for part, gradient in self._pairs(gradients):
            self._update(part, gradient * factor, step=step, lr=lr)
        for bucket in self._buckets:
            self._gather_weights(bucket)
        return norm, total[1:]

    @property
    def _is_second_end(self) -> bool:
        return self.meshes.ends is not None and self.meshes.at.pp > 0

    def _pairs(self, gradients: list[list[Tensor]]) -> Iterator[tuple[ParameterShard, Tensor]]:
        for bucket, of_bucket in zip(self._buckets, gradients, strict=True):
            yield from zip(bucket, of_bucket, strict=True)

    def _reduce_gradients(self, bucket: list[ParameterShard]) -> list[Tensor]:
        """The gradients' sums over the replicas, for this one's parts."""
        group = self._group(bucket[0])
        own = torch.cat([self._as_chunks(part, group.size()) for part in bucket], dim=1)
        if group.size() > 1:
            own = reduce_scatter(own, group)
        lengths = [part.num_rows * part.chunk for part in bucket]
        return [
            flat.view(part.num_rows, part.chunk)[:, : part.own.stop - part.own.start]
            for part, flat in zip(bucket, own.view(-1).split(lengths), strict=True)
        ]

    @staticmethod
    def _as_chunks(part: ParameterShard, num_replicas: int) -> Tensor:
        """A gradient, which it drops, as [R, rows * chunk]."""
        gradient = part.parameter.grad
        part.parameter.grad = None
        if gradient is None:  # a module that no token of this step used
            gradient = torch.zeros_like(part.parameter)
        matrix = part.matrix(gradient)
        padded = nn.functional.pad(matrix, (0, num_replicas * part.chunk - matrix.shape[1]))
        return padded.unflatten(1, (num_replicas, part.chunk)).transpose(0, 1).flatten(1)

    def _gather_weights(self, bucket: list[ParameterShard]) -> None:
        """Every replica's parts to all of them."""
        group = self._group(bucket[0])
        if group.size() == 1:
            return
        width = [part.chunk - (part.own.stop - part.own.start) for part in bucket]
        own = [nn.functional.pad(part.weight, (0, more)).flatten() for part, more in zip(bucket, width, strict=True)]
        gathered = all_gather(torch.cat(own), group)
        for part, flat in zip(bucket, gathered.split([len(one) for one in own], dim=1), strict=True):
            whole = flat.unflatten(1, (part.num_rows, part.chunk)).transpose(0, 1).flatten(1)
            matrix = part.matrix(part.parameter)
            matrix.copy_(whole[:, : matrix.shape[1]])

    def _join_ends(self, gradients: list[list[Tensor]]) -> None:
        if self.meshes.ends is None:
            return
        for part, gradient in self._pairs(gradients):
            if part.name == self.shared:
                gradient.copy_(all_reduce_sum(gradient.contiguous(), self.meshes.ends))

    def _update(self, part: ParameterShard, gradient: Tensor, *, step: int, lr: float) -> None:
        """AdamW (arXiv 1711.05101 alg. 2), in torch.optim.AdamW's order of operations."""
        beta1, beta2 = self.betas
        weight, exp_avg, exp_avg_sq = part.weight, part.exp_avg.float(), part.exp_avg_sq.float()
        if part.parameter.dim() >= 2:
            weight.mul_(1 - lr * self.weight_decay)
        exp_avg.lerp_(gradient, 1 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        denominator = (exp_avg_sq.sqrt() / math.sqrt(1 - beta2 ** (step + 1))).add_(EPS)
        weight.addcdiv_(exp_avg, denominator, value=-lr / (1 - beta1 ** (step + 1)))
        part.exp_avg.copy_(exp_avg)  # rounds; FP32 moments are updated in place, and this does nothing
        part.exp_avg_sq.copy_(exp_avg_sq)

    def state(self) -> dict[str, Tensor]:
        """Weights and moments as DTensors over the whole model's tensors, of the parts that are not empty.

        A rank writes to them what it loads, then calls `gather_weights`. The keys are `weight/NAME`, `exp_avg/NAME` and
        `exp_avg_sq/NAME`; dense tensors are flat, [F], stacks of experts [E, F], whatever the layout.
        """
        return {
            f"{kind}/{part.name}": self._global(part, tensor)
            for part in self.parts
            for kind, tensor in (
                ("weight", part.weight),
                ("exp_avg", part.exp_avg),
                ("exp_avg_sq", part.exp_avg_sq),
            )
            if tensor.numel()
        }

    def gather_weights(self) -> None:
        """The replicas' parts of the weights to all of them, as at the end of a step."""
        for bucket in self._buckets:
            self._gather_weights(bucket)

    def _global(self, part: ParameterShard, own: Tensor) -> DTensor:
        layout, num_columns = self.meshes.layout, part.num_columns
        if part.is_expert:
            mesh, placements = self.meshes.by_expert, (Shard(1), Shard(0))
            shape: tuple[int, ...] = (part.num_rows * layout.ep, num_columns)
        else:
            mesh, placements, own, shape = self.meshes.by_replica, (Shard(0),), own.view(-1), (num_columns,)
        stride = (num_columns, 1) if part.is_expert else (1,)
        return DTensor.from_local(own, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)


def _buckets(parts: list[ParameterShard], num_bytes: int) -> Iterator[list[ParameterShard]]:
    """Parts that travel together: of one group, up to a number of bytes."""
    for is_expert in (False, True):
        bucket: list[ParameterShard] = []
        for part in (part for part in parts if part.is_expert == is_expert):
            if bucket and sum(one.parameter.nbytes for one in bucket) + part.parameter.nbytes > num_bytes:
                yield bucket
                bucket = []
            bucket.append(part)
        if bucket:
            yield bucket
