"""Student, EMA teacher and objective in one object: the border between the method and the training loop.

losses = task(low, clean)
losses["loss"].backward(); optimizer.step()
task.after_optimizer_step()
"""

import copy

import torch
from pydantic import Field
from torch import Tensor, nn

from iaml.network import ENCODER_CHANNELS, SCALES, AutoEncoder, NetworkSettings
from iaml.normalization import Normalise, RunningStatistics, TeacherNorm, normalise_by_batch, normalise_by_running
from iaml.objective import Objective, ObjectiveSettings
from iaml.settings import Settings

LEVELS = len(ENCODER_CHANNELS) + SCALES  # of encoder and decoder together; each normalises once


class TeacherSettings(Settings):
    """The teacher: an exponential moving average of the student's decoder that sees clean images."""

    ema_rate: float = Field(
        0.999,
        ge=0,
        le=1,
        description="EMA rate m in T_D <- m T_D + (1 - m) S_D; 0 makes the teacher's decoder the student's, 1 freezes "
        "it; a global batch k times as large wants m^k",
    )
    ema_warmup: float = Field(
        0.75, ge=0, le=1, description="power p of the warm-up m_t = min(m, 1 - (1 + t)^-p) over updates t; 0 is none"
    )
    norm: TeacherNorm = Field(
        "running",
        description="statistics that normalise clean images: the student's running ones (learnt from dark images), "
        "those of the clean batch, or separate running ones",
    )


class TeacherStudent(nn.Module):
    """Owns the student, the teacher's decoder ``T_D`` and the objective, and turns a batch into losses.

    The teacher's encoder is the student's. Only the student's parameters are trained; projections whose
    scale has no weight are left out. The average is kept in float32.

    """

    _updates: Tensor

    def __init__(
        self,
        network: NetworkSettings | None = None,
        objective: ObjectiveSettings | None = None,
        teacher: TeacherSettings | None = None,
    ) -> None:
        super().__init__()
        self.settings = teacher or TeacherSettings()
        self.objective = Objective(objective or ObjectiveSettings())
        self.student = AutoEncoder(network)
        self.teacher_decoder = copy.deepcopy(self.student.decoder).float().requires_grad_(False)
        channels = self._channels() if self.settings.norm == "separate" else []
        self.clean_statistics = nn.ModuleList(RunningStatistics(count) for count in channels)
        self.register_buffer("_updates", torch.zeros((), dtype=torch.int64), persistent=False)
        self._freeze_unused_projections()

    def forward(self, low: Tensor, clean: Tensor) -> dict[str, Tensor]:
        """The losses of a batch.

        Args:
            low: ``x``, RGB in [0, 1], float, shape (B, 3, H, W), H and W multiples of 32.
            clean: ``y``, likewise.

        Returns:
            Float32 scalars: ``loss`` with its gradient, and each term of the objective by name, detached.
        """
        features = self.student.decoder(self.student.encoder(low))
        prediction = self.student.decoder.head(features[-1], low)
        mirrors = self.objective.settings.mirror_weight > 0
        student_maps = self.student.decoder.mirror_maps(features) if mirrors else []
        teacher_maps = self.teacher_maps(clean) if mirrors else []
        terms = self.objective.terms(prediction, low, clean, student_maps, teacher_maps)
        return {"loss": self.objective.total(terms), **{name: term.detach() for name, term in terms.items()}}

    @torch.no_grad()
    def teacher_maps(self, clean: Tensor) -> list[Tensor]:
        """``t_i``: the teacher's features of clean images, coarsest first, without gradient."""
        norms = self._clean_norms()
        pyramid = self.student.encoder(clean, norms[:-SCALES])
        return self.teacher_decoder.mirror_maps(self.teacher_decoder(pyramid, norms[-SCALES:]))

    @property
    def updates(self) -> int:
        """How often the teacher has moved; it sets the warm-up, so save it with the weights. Waits for the device."""
        return int(self._updates)

    @updates.setter
    def updates(self, count: int) -> None:
        self._updates.fill_(count)

    @property
    def ema_rate(self) -> Tensor:
        """The rate ``m_t`` of the next update, warm-up included: a float64 scalar on the device."""
        rate, power = self.settings.ema_rate, self.settings.ema_warmup
        if rate == 1 or power == 0:
            return torch.full_like(self._updates, rate, dtype=torch.float64)
        return (1 - (1 + self._updates.double()) ** -power).clamp(max=rate)

    @torch.no_grad()
    def after_optimizer_step(self, applied: Tensor | bool = True) -> None:
        """Move the teacher: ``T_D <- m_t T_D + (1 - m_t) S_D``; call once for each step.

        Args:
            applied: whether the step moved the weights; a scalar on the device is not waited for. The teacher stays
                as it is where it is false.
        """
        weight = ((1 - self.ema_rate) * applied).float()
        averages = [*self.teacher_decoder.parameters(), *self.teacher_decoder.buffers()]
        sources = [*self.student.decoder.parameters(), *self.student.decoder.buffers()]
        pairs = list(zip(averages, sources, strict=True))
        moving, moved_to = zip(*((old, new.float()) for old, new in pairs if old.is_floating_point()), strict=True)
        torch._foreach_lerp_(moving, moved_to, [weight] * len(moving))
        for counter, source in pairs:
            if not counter.is_floating_point():
                counter.copy_(source)
        self._updates += applied

    def averaged_student(self) -> AutoEncoder:
        """A copy of the student with the averaged decoder: a second candidate for inference."""
        averaged = copy.deepcopy(self.student)
        averaged.decoder.load_state_dict(self.teacher_decoder.state_dict())
        return averaged

    def _clean_norms(self) -> list[Normalise]:
        """What normalises clean images at each level: the encoder's, then the decoder's."""
        match self.settings.norm:
            case "running":
                return [normalise_by_running] * LEVELS
            case "batch":
                return [normalise_by_batch] * LEVELS
            case "separate":
                return list(self.clean_statistics)

    def _channels(self) -> list[int]:
        """How many channels each level normalises: the encoder's, then the decoder's."""
        modules = [*self.student.encoder.modules(), *self.teacher_decoder.modules()]
        return [module.num_features for module in modules if isinstance(module, nn.BatchNorm2d)]

    def _freeze_unused_projections(self) -> None:
        settings = self.objective.settings
        for weight, projection in zip(settings.scale_weights, self.student.decoder.projections, strict=True):
            projection.requires_grad_(weight * settings.mirror_weight > 0)
