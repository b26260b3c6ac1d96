"""The student's world and its DeepSpeed engine: the only importer of deepspeed in this package."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Iterator
from contextlib import nullcontext, redirect_stdout
from importlib import resources
from io import StringIO
from pathlib import Path
from typing import Any

import deepspeed
import deepspeed.utils
import torch
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from torch import Tensor
from torch.nn import functional as F

from megapd.batch import Batch
from megapd.config import OptimizerConfig, TrainingConfig
from megapd.errors import Diverged, UserError
from megapd.evaluation import label_logprobs
from megapd.models import Compared, Learner
from megapd.models.layers import Block
from megapd.signals import Signal
from megapd.tiling import Tiling, tile
from megapd.world import World, init_deepspeed, join_world


def start_world() -> World:
    """The student's ranks, with DeepSpeed's communication on top."""
    world = join_world()
    init_deepspeed(world)
    return world


def parameter_groups(learner: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; biases and norms do not."""
    matrices = [p for p in learner.parameters() if p.ndim >= 2]
    vectors = [p for p in learner.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def deepspeed_config(training: TrainingConfig, tiling: Tiling) -> dict[str, Any]:
    """The stage's JSON, with what the run's own settings decide laid over it, and sums in fp32 unless it says otherwise."""
    file = training.deepspeed or resources.files("megapd.configs") / "deepspeed" / f"zero{training.zero_stage}.json"
    if not file.is_file():
        raise UserError(f"training.deepspeed: {training.deepspeed}: no such file")
    try:
        settings = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"training.deepspeed: {training.deepspeed}: not valid JSON: {error}") from error
    sections = ("zero_optimization", "bf16", "fp16", "data_types")
    if not isinstance(settings, dict) or not all(isinstance(settings.get(name, {}), dict) for name in sections):
        raise UserError(f"training.deepspeed: {training.deepspeed}: expected a JSON object of DeepSpeed's sections")
    clash = [key for key in ("optimizer", "scheduler") if key in settings]
    if clash:
        raise UserError(f"training.deepspeed: remove {clash[0]!r} from the JSON; the optimizer and lr sections decide it")
    if training.zero_stage == 0 and "data_types" in settings:
        raise UserError("training.deepspeed: remove 'data_types' from the JSON; at stage 0 micro-batches are summed in fp32")
    settings |= {
        "train_batch_size": tiling.global_batch,
        "train_micro_batch_size_per_gpu": tiling.micro_batch,
        "gradient_accumulation_steps": tiling.accumulation,
        # ZeRO clips by the global norm; plain fp32 at stage 0 has no optimizer wrapper and is clipped below.
        "gradient_clipping": 0.0 if _plain(training) else training.clip,
        "bf16": {**settings.get("bf16", {}), "enabled": training.precision == "bf16", "check_grad_overflow": True},
        "fp16": {**settings.get("fp16", {}), "enabled": training.precision == "fp16"},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
    }
    settings.setdefault("zero_optimization", {})["stage"] = training.zero_stage
    if training.precision != "fp32":
        # DeepSpeed sums micro-batches and ranks in the model's type unless it is told otherwise. It knows no other at stage 0,
        # where torch is told; see Engine.
        if tiling.accumulation > 1 and training.zero_stage > 0:
            settings.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
        if tiling.ranks > 1:
            settings.setdefault("communication_data_type", "fp32")
    return settings


class Engine:
    """A student under ZeRO: forward and backward of micro-batches, then one update."""

    def __init__(
        self, learner: Learner, training: TrainingConfig, optimizer: OptimizerConfig, world: World, *, compiled: bool = False
    ) -> None:
        """compiled: the learner's blocks are. Raises UserError for a batch that does not divide, or a bad training.deepspeed."""
        self.training, self.world = training, world
        self.tiling = tile(training, world.size)
        if training.zero_stage == 3 and compiled:
            # Hooks inside a compiled block break its graph 21 times; with the block as the unit that is gathered there are none.
            deepspeed.utils.set_z3_leaf_modules(learner, list({type(m) for m in learner.modules() if isinstance(m, Block)}))
        self._linear = F.linear
        with redirect_stdout(StringIO()):  # where sums are in fp32 at stage 1, DeepSpeed prints 18 lines of memory
            self.deepspeed, *_ = deepspeed.initialize(
                model=learner,
                optimizer=_optimizer(learner, optimizer, fused=world.device.type == "cuda"),
                config=deepspeed_config(training, self.tiling),
                dist_init_required=False,
            )
        if training.zero_stage == 0 and not _plain(training):
            # DeepSpeed's 16-bit optimizer makes its state with an update of zero gradients, which leaves AdamW's step count at 1:
            # the first real update would be a quarter too small.
            self.deepspeed.optimizer.optimizer.state.clear()
            if self.tiling.accumulation > 1:
                for parameter in learner.parameters():
                    parameter.grad_dtype = torch.float32
        self.learner: Learner = self.deepspeed.module
        self.grad_norm = math.nan  # of the last update, before clipping

    def accumulate(self, batch: Batch, signal: Signal | None, denominator: int, compared: Compared | None = None) -> Tensor:
        """Forward and backward of one micro-batch; returns its detached sums, see Learner.forward.

        denominator: labelled positions of the whole global batch. Ranks and micro-batches add up to the gradient of the
        global mean, however many there are; DeepSpeed averages over ranks, which the factor world.size undoes.
        """
        outputs: tuple[Tensor, Tensor] = self.deepspeed(batch, signal, max(denominator, 1), compared=compared)
        loss, stats = outputs
        if signal is not None and signal.doubt is not None:
            loss, stats = loss + signal.doubt, stats + signal.doubt
        # A loss of inf can have finite gradients; as NaN it reaches the gradient norm, where all ranks agree to skip the step.
        loss = loss * torch.where(torch.isfinite(loss.detach()), float(self.world.size), math.nan)
        self.deepspeed.backward(loss, scale_wrt_gas=False)
        # Counts DeepSpeed's micro-steps; the update itself happens in `step`.
        if not self.deepspeed.is_gradient_accumulation_boundary():
            self.deepspeed.step()
        return stats

    def step(self, lr: float) -> bool:
        """Update the parameters; False if the gradients were not finite and the update was skipped, on all ranks."""
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = lr
        if _plain(self.training):
            return self._plain_step()
        try:
            self.deepspeed.step()
        except Exception as error:  # DeepSpeed raises no narrower type here
            if "loss scale already at minimum" in str(error):
                raise Diverged(f"the fp16 loss scale fell to its minimum: {error}; lower optimizer.lr, or choose bf16") from error
            raise
        self.grad_norm = float(self.deepspeed.get_global_grad_norm())
        return bool(self.deepspeed.was_step_applied())

    def _plain_step(self) -> bool:
        """Stage 0 in fp32: gradients are whole and equal on all ranks, and no DeepSpeed optimizer checks them."""
        parameters = [p for p in self.learner.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        self.grad_norm = float(norm)
        if not (finite := math.isfinite(self.grad_norm)):
            for parameter in parameters:
                parameter.grad = None
        elif self.training.clip > 0:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.training.clip, norm)
        self.deepspeed.step()
        return finite

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> Tensor:
        """Detached sums of a held-out batch against its labels: 0, cross entropy, correct, .."""
        stats: Tensor = self.learner(batch, None, max(batch.labelled, 1))[1]
        return stats

    @torch.no_grad()
    def label_logprobs(self, batch: Batch) -> Tensor:
        """log p of each label of a batch [N], fp32."""
        return label_logprobs(self.learner, batch)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Each parameter's name and whole tensor, gathered one at a time under ZeRO-3; all ranks must iterate together."""
        gathered = self.training.zero_stage == 3
        for name, parameter in self.learner.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter]) if gathered else nullcontext():
                yield name, parameter.detach()

    def load_former(self, folder: Path) -> dict[str, Any]:
        """Restore what DeepSpeed wrote for a run of an older megapd on the same ranks, and return what it carried.

        UserError, and nothing is executed, where a file holds more than tensors, plain values and DeepSpeed's own records.
        """
        state: dict[str, Any]
        self.deepspeed.checkpoint_engine = _Restricted()
        try:
            path, state = self.deepspeed.load_checkpoint(str(folder.parent), tag=folder.name, load_lr_scheduler_states=False)
        except pickle.UnpicklingError as error:
            what = str(error).strip().splitlines()[-1].strip()
            raise UserError(f"{folder}: it would execute what is no part of a checkpoint ({what}); do not use it") from error
        assert path is not None, f"DeepSpeed found nothing at {folder}, which was verified"
        return state

    def destroy(self) -> None:
        """Also puts torch's linear function back, which ZeRO-3 replaces for the process: torch.compile warns of DeepSpeed's."""
        self.deepspeed.destroy()
        F.linear = self._linear


class _Restricted(TorchCheckpointEngine):  # type: ignore[misc]
    """Reads DeepSpeed's pickles without executing anything."""

    def load(self, path: str, map_location: Any = None) -> Any:
        with torch.serialization.safe_globals([LossScaler, DynamicLossScaler, fragment_address, ZeroStageEnum]):
            return torch.load(path, map_location=map_location, weights_only=True)


def _optimizer(learner: Learner, settings: OptimizerConfig, *, fused: bool) -> torch.optim.Optimizer:
    groups = parameter_groups(learner, settings.weight_decay)
    if settings.kind == "adamw":
        return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=fused)
    return torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum)


def _plain(training: TrainingConfig) -> bool:
    return training.zero_stage == 0 and training.precision == "fp32"
