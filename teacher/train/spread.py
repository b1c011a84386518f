"""V3's recipe over a layout: pipeline stages, spread experts and copies, with checkpoints that any layout goes on from.

What is learned is what `teacher.train.pretrain` learns in one process, but for the order of sums: every micro-batch's
loss is its share of the mean over all target tokens of the step, wherever they are, and gradients are added up.

Shape legend: R rows, T positions, L MoE layers, E routed experts.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from packaging.version import Version
from torch import Tensor

from distill.errors import EnvironmentFault, RecipeError
from distill.failpoints import failpoint
from distill.packing import Rows
from distill.training.loop import BETAS, LOG_EVERY, LogRow, TrainingRun
from distill.training.losses import IGNORED, cross_entropy, labels
from distill.training.row_order import RowOrder
from teacher.model.balance import update_bias
from teacher.model.config import DeepseekV3Config
from teacher.model.initialise import draw_entry
from teacher.model.names import empty_model
from teacher.model.transformer import DeepseekV3
from teacher.parallel.groups import all_reduce_sum, lost_peers
from teacher.parallel.layout import STAGES_PER_RANK
from teacher.parallel.meshes import Meshes
from teacher.parallel.pipeline.pipeline import Pipeline
from teacher.parallel.pipeline.stage import EMBEDDING, fill, own_entries, own_part
from teacher.train import checkpoints
from teacher.train.activations import SavedActivations
from teacher.train.config import PretrainConfig
from teacher.train.pretrain import TITLE, check_losses, log_entries, max_load
from teacher.train.zero import ZeroAdamW

MOMENTS = {"fp32": torch.float32, "bf16": torch.bfloat16}
# torch 2.11 splits a backward pass wrongly where an operation has several outputs, as those recomputed here have: it
# adds up their gradients.
SPLITS_RECOMPUTED = Version("2.12")


def draw_part(config: DeepseekV3Config, meshes: Meshes, *, seed: int) -> DeepseekV3:
    """This rank's part of a fresh model, the same model whatever the layout."""
    model = own_part(empty_model(config), meshes)
    experts = meshes.layout.placement(config.n_routed_experts).of_rank(meshes.at.ep)

    def value(name: str, shape: tuple[int, ...]) -> Tensor:
        of_stack = experts if ".experts." in name else None
        return draw_entry(name, shape, std=config.initializer_range, seed=seed, experts=of_stack)

    fill(model, own_entries(model, meshes.layout, meshes.at.pp), value)
    return model


class SpreadPretraining(TrainingRun[tuple[Tensor, Tensor | None, float]]):
    """One run on one of its ranks; all ranks make the same calls. It goes on from the newest complete checkpoint.

    `model` is this rank's part of it (`draw_part`). `log` is that of `Pretraining`, on every rank. With `bf16` (None:
    on a GPU) products are in BF16, else all is in FP32. Raises EnvironmentFault for recomputation under a schedule
    whose backward passes torch is too old to split. `run` raises TrainingFailure as soon as a loss is not finite,
    EnvironmentFault where a rank is lost, RecipeError where the checkpoint is of another recipe.
    """

    title = TITLE

    def __init__(
        self,
        model: DeepseekV3,
        rows: Rows,
        config: PretrainConfig,
        meshes: Meshes,
        *,
        checkpoint_dir: Path | None = None,
        log_every: int = LOG_EVERY,
        bf16: bool | None = None,
    ) -> None:
        super().__init__(num_steps=config.num_steps, tokens_per_step=config.tokens_per_step, log_every=log_every)
        self.bf16 = meshes.device.type == "cuda" if bf16 is None else bf16
        self.model, self.config, self.meshes = model, config, meshes
        self.ids_RT = torch.from_numpy(rows.ids.astype("int64"))
        self.labels_RT = labels(self.ids_RT, torch.from_numpy(rows.is_target))
        self.corpus = hashlib.sha256(rows.ids.tobytes() + rows.is_target.tobytes()).hexdigest()
        self.order = RowOrder(len(self.ids_RT), config.rows_per_step, seed=config.seed)
        num_sequences = config.rows_per_step // (meshes.layout.num_replicas * meshes.layout.microbatches)
        self._share = num_sequences / config.rows_per_step  # of a micro-batch in the step's rows
        self.pipeline = Pipeline(
            model,
            meshes,
            loss=self._loss,
            shape=(num_sequences, self.ids_RT.shape[1]),
            balance_weight=config.balance_alpha * self._share,
            experts="grouped" if meshes.device.type == "cuda" and self.bf16 else "sorted",
        )
        memory, schedule = config.memory, meshes.layout.schedule
        if memory.recompute and STAGES_PER_RANK[schedule] > 1 and Version(torch.__version__) < SPLITS_RECOMPUTED:
            message = (
                f"recomputation with {schedule} needs torch {SPLITS_RECOMPUTED} or later, this is {torch.__version__}"
            )
            raise EnvironmentFault(message, where="torch")
        SavedActivations(self.pipeline.blocks, recompute=memory.recompute, fp8=memory.activations == "fp8")
        held = {id(parameter) for parameter in self.pipeline.blocks.parameters()}
        self.optimizer = ZeroAdamW(
            {name: parameter for name, parameter in model.named_parameters() if id(parameter) in held},
            meshes,
            betas=BETAS,
            weight_decay=config.weight_decay,
            moments=MOMENTS[memory.moments],
            shared=EMBEDDING if model.config.num_nextn_predict_layers else None,
        )
        self.checkpoint_dir = checkpoint_dir
        self._seen: list[Tensor] = []
        self._counts, self._mtp_weight = (1, 1), 0.0

    def make_step(self, step: int) -> tuple[Tensor, Tensor | None, float]:
        """(main, MTP and balance loss of the whole step, this stage's load [L, E], norm of the gradients)."""
        config = self.config
        rows = self.order.rows(step)
        all_labels = self.labels_RT[rows]
        self._counts = tuple(max(1, int((all_labels[:, ahead:] != IGNORED).sum())) for ahead in (1, 2))
        self._mtp_weight = config.mtp_weight_at(step)
        self._seen.clear()
        own = rows.chunk(self.meshes.layout.num_replicas)[self.meshes.replica]
        with (
            torch.autocast(self.meshes.device.type, torch.bfloat16, enabled=self.bf16),
            lost_peers(self.meshes.pipeline),
        ):
            self.pipeline.step(*(part[own].to(self.meshes.device) for part in (self.ids_RT, self.labels_RT)))
        sums = torch.zeros(3, dtype=torch.float64, device=self.meshes.device)
        if self._seen:
            sums[:2] = torch.stack(self._seen).double().sum(dim=0)
        loads = []
        for block in self.pipeline.blocks:
            if (statistics := block.take_statistics()) is not None:
                loads.append(statistics[0])
                sums[2] += statistics[1].double() * self._share
        load_LE = all_reduce_sum(torch.cat(loads), self.meshes.replicas) if loads else None
        norm, sums = self.optimizer.step(step=step, lr=config.lr_at(step), max_norm=config.max_grad_norm, sums=sums)
        check_losses(step, sums)  # at every step: before anything of it could be saved
        if load_LE is not None and (speed := config.bias_speed_at(step)):
            update_bias((router for block in self.pipeline.blocks for router in block.routers()), load_LE, speed)
        return sums, load_LE, norm

    def _loss(self, output: Tensor | tuple[Tensor, Tensor], labels_BT: Tensor) -> Tensor:
        logits_BTV, mtp_logits_BTV = output if isinstance(output, tuple) else (output, None)
        main = cross_entropy(logits_BTV, labels_BT, ahead=1, reduction="sum") / self._counts[0]
        mtp = main.new_zeros(())
        if mtp_logits_BTV is not None:
            mtp = cross_entropy(mtp_logits_BTV, labels_BT, ahead=2, reduction="sum") / self._counts[1]
        self._seen.append(torch.stack((main, mtp)).detach())
        return main + self._mtp_weight * mtp

    def measure(self, step: int, outcome: tuple[Tensor, Tensor | None, float]) -> LogRow:
        sums, load_LE, norm = outcome
        largest = torch.ones(1, device=self.meshes.device)
        if load_LE is not None:
            largest[0] = max_load(load_LE)
        with lost_peers(self.meshes.world):
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.meshes.world)
        return log_entries(self.config, step, sums, largest, norm)

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def _state(self) -> dict[str, Tensor]:
        """Everything that a step changes. Biases of a router are alike on all replicas of its stage."""
        names = {id(tensor): name for name, tensor in self.model.named_buffers()}
        biases = [router.e_score_correction_bias for block in self.pipeline.blocks for router in block.routers()]
        return {**self.optimizer.state(), **{f"bias/{names[id(bias)]}": bias for bias in biases}}

    def step_ended(self, step: int) -> None:
        failpoint("step.ended", f"{step}.{self.meshes.rank}")
        done, every = step + 1, self.config.checkpoint.every
        if self.checkpoint_dir is not None and every and (done % every == 0 or done == self.config.num_steps):
            self._save(self.checkpoint_dir, done)

    def _save(self, folder: Path, num_steps: int) -> None:
        record = {
            "position": self.order.position(num_steps)._asdict(),
            "corpus": self.corpus,
            "learned": self.config.what_is_learned(),
            "layout": self.config.layout.model_dump(mode="json"),
            "log": self.log,
        }
        keep, world = self.config.checkpoint.keep, self.meshes.world
        checkpoints.save(folder, num_steps, self._state(), record, keep=keep, world=world)

    def resume(self) -> int:
        """Load the newest checkpoint; returns the number of steps that are done."""
        found = None if self.checkpoint_dir is None else checkpoints.newest(self.checkpoint_dir, self.meshes.world)
        if found is None:
            return 0
        self._check(found)
        checkpoints.load(found, self._state(), self.meshes.world)
        self.optimizer.gather_weights()
        self.log = found.record["log"]
        return int(found.record["step"])

    def _check(self, found: checkpoints.Checkpoint) -> None:
        ours: dict[str, Any] = {**self.config.what_is_learned(), "corpus": self.corpus}
        theirs = {**found.record["learned"], "corpus": found.record["corpus"]}
        for field in ours:
            if ours[field] != theirs.get(field):
                message = f"the run there has {theirs.get(field)!r}, this one {ours[field]!r}; choose another folder"
                raise RecipeError(message, where=found.folder / checkpoints.RECORD, field=field)
