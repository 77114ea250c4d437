"""The engine around DeepSpeed: one optimizer step at a time, and a state that any number of workers can load."""

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_optimizer_state, safe_set_full_optimizer_state
from torch import Tensor

from iaml import TeacherStudent, multiplies_bf16_fast, use_global_batch_norm
from pipeline.settings.optimizer import OptimizerSettings
from pipeline.settings.train import BatchNorm
from pipeline.training.graph import CapturedFunction
from pipeline.training.step import GuardedAdam, average_over_workers, poison_unless_finite, restore_unless

MOMENTS = ("exp_avg", "exp_avg_sq")  # the state that Adam keeps for each parameter


@dataclass(frozen=True)
class StepResult:
    """What one step did: scalars on the device, which are to be read only where they are needed.

    Attributes:
        losses: means over the micro-batches of this worker, by name.
        grad_norm: norm of the global gradient before clipping; infinite or NaN when the step was skipped.
        ema_rate: rate ``m_t`` of the teacher's update.
        applied: whether the weights moved.
    """

    losses: dict[str, Tensor]
    grad_norm: Tensor
    ema_rate: Tensor
    applied: Tensor


class Engine:
    """A ``TeacherStudent`` under DeepSpeed; all workers build and step theirs together.

    Args:
        task: the method, already on its device, with the weights to start from.
        settings: optimizer, schedule and precision.
        micro_batch: samples of one worker in one forward pass.
        accumulation: forward passes for one optimizer step.
        batch_norm: whose batches batch normalisation spans from here on.

    Attributes:
        is_bf16: whether the networks run in bfloat16.
    """

    def __init__(
        self,
        task: TeacherStudent,
        settings: OptimizerSettings,
        micro_batch: int,
        accumulation: int,
        batch_norm: BatchNorm = "global",
    ) -> None:
        self._own_statistics = batch_norm == "worker"
        use_global_batch_norm(task, _group_of_this_worker() if self._own_statistics else None)
        self.task = task
        self._settings = settings
        self._trained = {name: value for name, value in task.named_parameters() if value.requires_grad}
        self._device = next(task.parameters()).device
        self.is_bf16 = settings.precision == "bf16" or (
            settings.precision == "auto" and _multiply_bf16_fast(self._device)
        )
        disable_shared_memory_operator()
        self._engine, *_ = deepspeed.initialize(
            args=arguments_for(self._device),
            model=task,
            optimizer=self._adam(),
            config=self._config(micro_batch, accumulation),
            dist_init_required=False,
        )
        if self._engine.device != self._device:
            raise RuntimeError(f"DeepSpeed would train on {self._engine.device}, the networks lie on {self._device}")
        if settings.channels_last and settings.zero_stage == 0:
            # only now: DeepSpeed (0.19.8) broadcasts contiguous weights alone, and ZeRO flattens them
            for value in [*task.parameters(), *task.buffers()]:
                if value.dim() == 4:
                    value.data = value.data.contiguous(memory_format=torch.channels_last)
        self._start_moments(steps=0)
        self._loss_names: tuple[str, ...] = ()  # of what _run gives, known once it has run
        # with several workers the exchange would have to be captured as well
        is_captured = self._device.type == "cuda" and settings.zero_stage == 0 and dist.get_world_size() == 1
        self._compute = CapturedFunction(self._run) if is_captured else self._run

    def step(self, batches: Sequence[tuple[Tensor, Tensor]], learning_rate: float) -> StepResult:
        """One optimizer step over the micro-batches of low-light and clean images.

        A step with a non-finite loss or gradient on any worker is skipped on all of them: weights, optimizer
        state, running statistics and teacher stay as they were.

        Args:
            batches: pairs of uint8 tensors of shape (B, 3, H, W), on the engine's device.
            learning_rate: of this step.
        """
        for group in self._engine.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(learning_rate)
            else:
                group["lr"] = learning_rate
        grad_norm, ema_rate, applied, *losses = self._compute(batches)
        return StepResult(dict(zip(self._loss_names, losses, strict=True)), grad_norm, ema_rate, applied)

    def _run(self, batches: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """The step, on the device: the gradient's norm, the teacher's rate, whether the weights moved, the losses."""
        statistics = [*self.task.student.buffers(), *self.task.clean_statistics.buffers()]
        before = [value.clone() for value in statistics]
        sums: dict[str, Tensor] = {}
        for low, clean in batches:
            losses = self._engine(self._images(low), self._images(clean))
            self._engine.backward(poison_unless_finite(losses["loss"]))
            for name, value in losses.items():
                sums[name] = sums.get(name, 0.0) + value.detach() / len(batches)
            self._engine.step()
        grad_norm, applied = self._outcome()
        if self._own_statistics:
            average_over_workers(statistics)
        restore_unless(applied, statistics, before)
        rate = self.task.ema_rate
        self.task.after_optimizer_step(applied)
        self._loss_names = tuple(sums)
        return [grad_norm, rate, applied, *sums.values()]

    def _outcome(self) -> tuple[Tensor, Tensor]:
        """The gradient's norm, and whether the weights moved."""
        optimizer = self._engine.optimizer
        if isinstance(optimizer, GuardedAdam):
            return optimizer.grad_norm, optimizer.applied
        # ZeRO's own optimizers have waited for the device
        norm, applied = float(self._engine.get_global_grad_norm()), bool(self._engine.was_step_applied())
        return torch.tensor(norm, device=self._device), torch.tensor(applied, device=self._device)

    def optimizer_state(self) -> dict[str, Tensor]:
        """Adam's moments by ``name.moment``, whole, on the CPU; all workers must call this together."""
        if self._settings.zero_stage == 0:
            full = {name: self._engine.optimizer.state[value] for name, value in self._trained.items()}
            return {f"{name}.{key}": state[key].cpu().contiguous() for name, state in full.items() for key in MOMENTS}
        return {
            f"{name}.{key}": safe_get_full_optimizer_state(value, key).cpu().contiguous()
            for name, value in self._trained.items()
            for key in MOMENTS
        }

    def load_optimizer_state(self, state: dict[str, Tensor], steps: int) -> None:
        """Continue from moments that ``optimizer_state`` gave after ``steps`` applied steps, whatever the workers."""
        adam = self._start_moments(steps)
        for name, value in self._trained.items():
            for key in MOMENTS:
                moment = state[f"{name}.{key}"].to(self._device)
                if self._settings.zero_stage == 0:
                    adam.state[value][key].copy_(moment)
                else:
                    safe_set_full_optimizer_state(value, moment, key)

    def _start_moments(self, steps: int) -> torch.optim.Optimizer:
        """Moments of zero, as before the first step, which a checkpoint may come ahead of; returns their Adam."""
        zero = self._engine.optimizer
        adam: torch.optim.Optimizer = zero if self._settings.zero_stage == 0 else zero.optimizer
        for group in adam.param_groups:
            for value in group["params"]:
                moments = {key: torch.zeros_like(value) for key in MOMENTS}
                device = value.device if isinstance(adam, GuardedAdam) else None  # fused, it counts where it computes
                adam.state[value] = {"step": torch.tensor(float(steps), device=device), **moments}
        if self._settings.zero_stage > 0:
            link_moments(zero)
        return adam

    def _images(self, batch: Tensor) -> Tensor:
        # feature maps keep the images' layout
        layout = torch.channels_last if self._settings.channels_last else torch.contiguous_format
        return batch.to(torch.float32, memory_format=layout).div_(255)

    def _adam(self) -> torch.optim.Adam:
        options: dict[str, Any] = {"lr": self._settings.learning_rate, "betas": self._settings.betas}
        parameters = list(self._trained.values())
        if self._settings.zero_stage == 0:
            if self._device.type == "cuda":  # read there, in a captured step as well
                options |= {"lr": torch.tensor(self._settings.learning_rate, device=self._device), "capturable": True}
            return GuardedAdam(parameters, clip=self._settings.clip, **options)
        return torch.optim.Adam(parameters, **options)

    def _config(self, micro_batch: int, accumulation: int) -> dict[str, Any]:
        stage = self._settings.zero_stage
        return {
            "train_micro_batch_size_per_gpu": micro_batch,
            "gradient_accumulation_steps": accumulation,
            # stage 0 clips in GuardedAdam
            "gradient_clipping": self._settings.clip if stage > 0 else 0.0,
            "zero_optimization": {"stage": stage, "overlap_comm": False},
            "torch_autocast": {
                "enabled": self.is_bf16,
                "dtype": "bfloat16",
                "lower_precision_safe_modules": [],  # the layers whose gradients would be exchanged in bf16
            },
            "steps_per_print": None,
            "timers": {"throughput": {"enabled": False}},  # which would wait for the device in each step
        }


def _multiply_bf16_fast(device: torch.device) -> bool:
    """Whether the processors of all workers multiply bfloat16 fast; all workers must ask together."""
    slow = torch.tensor(float(not multiplies_bf16_fast(device)), device=device)
    dist.all_reduce(slow)
    return not slow.item()


def _group_of_this_worker() -> dist.ProcessGroup:
    """A group of this worker alone; all workers must ask together."""
    own: dist.ProcessGroup = dist.new_subgroups(1)[0]  # type: ignore[no-untyped-call]
    return own


def disable_shared_memory_operator() -> None:
    """Keep each CPU worker from compiling an operator when it starts, which only DeepSpeed's inference uses.

    DeepSpeed (0.19.8) has no option for it: it builds what this table says that the machine can.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def link_moments(zero: Any) -> None:
    """Have ``safe_get_full_optimizer_state`` and its counterpart reach the moments that ZeRO's Adam has now.

    DeepSpeed (0.19.8) links them once, in its first step; no public function does it before, or for others.
    """
    zero._hp_optimizer_states_linked = False
    zero._lazy_init_hp_params_optimizer_state()


def arguments_for(device: torch.device) -> SimpleNamespace | None:
    """DeepSpeed's arguments for training on ``device``.

    By itself it takes the GPU whose index is LOCAL_RANK, which is not always the one that Ray gave the worker: Ray
    sorts the GPUs that it shows to workers as text, 10 before 9, and counts local ranks by address, which several
    nodes may share.
    """
    return None if device.index is None else SimpleNamespace(device_rank=device.index)
