"""The settings of a search: those of its runs, and what is varied between them."""

from typing import Annotated, Literal, Self
from urllib.parse import quote, urlsplit

from pydantic import AfterValidator, Field, field_validator, model_validator

from iaml import ObjectiveSettings, Settings, TeacherSettings
from iaml.settings import MOST_SEED
from pipeline import storage
from pipeline.settings.config import Config
from tune.goal import Goal


def _ordered(limits: tuple[float, float]) -> tuple[float, float]:
    if not 0 < limits[0] < limits[1]:
        raise ValueError(f"must be two numbers above 0, the lower one first, not {list(limits)}")
    return limits


Range = Annotated[tuple[float, float], AfterValidator(_ordered)]


class SearchSettings(Settings):
    """The search: how long, for what, over which ranges, and how trials are pruned."""

    trials: int = Field(32, ge=1, description="trials in all, those that are pruned or fail included")
    hours: float | None = Field(
        None, gt=0, description="time after which trials are no longer run, over all starts of the search; no limit"
    )
    objectives: tuple[str, ...] = Field(
        (),
        description="what is improved: psnr, ssim, lpips or a sum such as 'psnr - 20 lpips', of the chosen checkpoint "
        "on the development split; several give a Pareto front; by default checkpoint.metric",
    )
    sampler: Literal["tpe", "gp", "random"] = Field(
        "tpe",
        description="Optuna's sampler; tpe learns from trials that were pruned too, gp (Gaussian process) from "
        "finished ones alone",
    )
    scale_weights: Range | None = Field(
        (1 / 8, 8.0),
        description="range of each scale's share of objective.scale_weights, relative to the others, log scale; null "
        "leaves them alone",
    )
    gamma: Range | None = Field(
        (1 / 4, 4.0), description="range of objective.gamma, the illumination exponent, log scale; null leaves it alone"
    )
    ema_rate: Range | None = Field(
        (0.9, 0.9999), description="range of teacher.ema_rate m, log scale of 1 - m; null leaves it alone"
    )
    beta: Range | None = Field(None, description="range of objective.beta; null leaves it alone")
    mirror_weight: Range | None = Field(
        None, description="range of objective.mirror_weight lambda, log scale; null leaves it alone"
    )
    learning_rate: Range | None = Field(
        None, description="range of optimizer.learning_rate, log scale; null leaves it alone"
    )
    reduction: float | None = Field(
        3.0,
        gt=1,
        description="successive halving: at 1/9, 1/3 (reduction 3) of the steps, only a trial among the best third "
        "goes on; null runs all trials to the end",
    )
    concurrent: int | None = Field(None, ge=1, description="trials at the same time; by default as many as have room")
    database: str | None = Field(
        None,
        description="Optuna's database, such as postgresql://user@host/name, without password; by default study.db in "
        "the search's folder",
    )
    top: int = Field(3, ge=1, description="best settings that are trained again over seeds, beside the first trial's")
    seeds: int = Field(3, ge=2, description="seeds of each of those, other than the trials' own")

    @field_validator("objectives")
    @classmethod
    def _objectives_can_be_read(cls, objectives: tuple[str, ...]) -> tuple[str, ...]:
        texts = [Goal.parse(text).text for text in objectives]
        if len(set(texts)) < len(texts):
            raise ValueError(f"each may be named once: {', '.join(texts)}")
        return tuple(texts)

    @field_validator("ema_rate")
    @classmethod
    def _rates_are_below_one(cls, limits: tuple[float, float] | None) -> tuple[float, float] | None:
        if limits and limits[1] >= 1:
            raise ValueError(f"must end below 1, where the teacher would be frozen, not at {limits[1]:g}")
        return limits

    @field_validator("database")
    @classmethod
    def _no_password(cls, url: str | None) -> str | None:
        if url is None:
            return None
        parts = urlsplit(url)
        if "://" not in url:
            raise ValueError("must be a database URL, such as sqlite:////folder/study.db")
        if parts.password is not None or "passw" in parts.query:  # settings are printed and stored
            raise ValueError(
                "must not bear a password, which would be printed and stored: PostgreSQL takes it from PGPASSWORD or "
                "~/.pgpass, MySQL from its option file"
            )
        return url

    @model_validator(mode="after")
    def _something_varies(self) -> Self:
        if not any(getattr(self, name) for name in VARIED):
            raise ValueError(f"nothing is searched: give at least one range ({', '.join(VARIED)})")
        return self


# the settings that each range varies, as part and field of ``Config``
VARIED = {
    "scale_weights": ("objective", "scale_weights"),
    "gamma": ("objective", "gamma"),
    "ema_rate": ("teacher", "ema_rate"),
    "beta": ("objective", "beta"),
    "mirror_weight": ("objective", "mirror_weight"),
    "learning_rate": ("optimizer", "learning_rate"),
}
PAPER = {"objective": ObjectiveSettings(), "teacher": TeacherSettings()}


class SearchConfig(Config):
    """All settings of a search; without ``search``, those of its first trial."""

    search: SearchSettings = SearchSettings()

    @model_validator(mode="after")
    def _the_first_trial_is_within(self) -> Self:
        """The first trial is the paper's setting: what is searched must not be set otherwise, and be in its range."""
        for name, (part, field) in VARIED.items():
            limits = getattr(self.search, name)
            value = getattr(getattr(self, part), field)
            if limits is None:
                continue
            if part in PAPER and value != getattr(PAPER[part], field):
                raise ValueError(
                    f"{part}.{field} is searched: leave it at the paper's value, with which the search begins, and set "
                    f"its range, search.{name}; or set search.{name} to null"
                )
            if not limits[0] <= (1.0 if name == "scale_weights" else value) <= limits[1]:
                inside = "1, equal weights" if name == "scale_weights" else f"{value:g}, with which the search begins"
                raise ValueError(f"search.{name}: the range {list(limits)} must contain {inside}")
        lowest = self.optimizer.final_learning_rate
        if self.search.learning_rate and self.search.learning_rate[0] < lowest:
            raise ValueError(f"search.learning_rate must begin at optimizer.final_learning_rate ({lowest:g}) or above")
        of_mirror = [name for name in VARIED if name != "learning_rate" and getattr(self.search, name)]
        if of_mirror and self.objective.mirror_weight == 0:
            raise ValueError(f"search.{of_mirror[0]} has no effect because objective.mirror_weight is 0")
        if self.search.gamma and self.objective.beta == 0:
            raise ValueError("search.gamma has no effect because objective.beta is 0; set search.gamma to null")
        return self

    @model_validator(mode="after")
    def _what_is_improved_is_scored(self) -> Self:
        metrics = {metric for objective in self.objectives for metric in objective.factors}
        if "lpips" in metrics and self.evaluation.lpips == "none":
            raise ValueError("search.objectives need lpips, which evaluation.lpips: none turns off")
        return self

    @model_validator(mode="after")
    def _early_stopping_has_an_effect(self) -> Self:
        if self.search.reduction and not self.rungs:
            raise ValueError(
                f"search.reduction has no effect: no checkpoint is written before step {self.train.steps}; lower "
                "checkpoint.every, or set search.reduction to null"
            )
        return self

    @model_validator(mode="after")
    def _later_seeds_are_seeds(self) -> Self:
        most = MOST_SEED - self.search.seeds
        if self.run.seed > most:
            raise ValueError(
                f"run.seed must be at most {most}, not {self.run.seed}: the best settings are trained again with the "
                f"{self.search.seeds} seeds after it (search.seeds)"
            )
        return self

    @property
    def url(self) -> str:
        """Where the search is stored: not where a training run of its name is."""
        return f"{self.run.url}-search"

    @property
    def objectives(self) -> tuple[Goal, ...]:
        """What is improved."""
        return tuple(map(Goal.parse, self.search.objectives or [self.checkpoint.metric]))

    @property
    def rankings(self) -> frozenset[str]:
        """The metrics that checkpoints and trials are ranked by."""
        return super().rankings | {metric for objective in self.objectives for metric in objective.factors}

    @property
    def rungs(self) -> tuple[int, ...]:
        """Steps at which trials may be pruned: the checkpoints after 1/9 and 1/3 of the steps (reduction 3)."""
        if self.search.reduction is None:
            return ()
        wanted = (self.train.steps / self.search.reduction**power for power in (2, 1))
        steps = (-(-step // self.checkpoint.every) * self.checkpoint.every for step in wanted)
        return tuple(sorted({int(step) for step in steps if step < self.train.steps}))

    @property
    def study_url(self) -> str:
        """Optuna's database; ``ValueError`` where the search's folder can't hold one."""
        if self.search.database:
            return self.search.database
        if not storage.is_local(self.url):
            raise ValueError(
                f"search.database: {self.url} can't hold a database; give its URL, such as "
                "postgresql://user@host/name, or sqlite:////folder/study.db in a folder that lasts"
            )
        return f"sqlite:///{quote(storage.join(self.url, 'study.db'))}"
