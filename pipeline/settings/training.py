"""The settings of the run, the loop, the optimizer and the checkpoints."""

import math
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from iaml.settings import Seed, Settings
from pipeline.storage import Url, join


class RunSettings(Settings):
    """The run: its name, where it is stored, and what it runs on."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="name of the run; the same name continues it, a new name starts a new one",
    )
    storage: Url = Field(
        "~/iaml-runs", description="folder or s3://bucket/prefix that holds the runs; shared by all nodes"
    )
    start_from: Url | None = Field(
        None,
        description="run (its best checkpoint), checkpoint or student.safetensors that a new run takes student and "
        "teacher from; optimizer, schedule and data are its own",
    )
    workers: int = Field(1, ge=1, description="training workers, one for each GPU where GPUs are used")
    use_gpu: bool | None = Field(None, description="train on GPUs; by default if the cluster has one for each worker")
    cpus_per_worker: int = Field(1, ge=1, description="CPU cores of each worker")
    seed: Seed = Field(0, description="fixes initial weights, sample order and augmentation")
    max_failures: int = Field(3, ge=0, description="lost workers or nodes after which the run gives up")
    wait_s: float | None = Field(
        None,
        ge=0,
        description="seconds to wait for nodes that the run needs and the cluster lacks so far; by default 600 where "
        "Ray's autoscaler (version 2) brings nodes, else 0",
    )

    @property
    def url(self) -> str:
        """Where this run is stored."""
        return join(self.storage, self.name)


class TrainSettings(Settings):
    """The training loop, counted in optimizer steps."""

    steps: int = Field(ge=1, description="optimizer steps in all")
    global_batch: int = Field(8, ge=1, description="pairs in one optimizer step, over all workers")
    accumulation: int = Field(1, ge=1, description="forward passes that make up one optimizer step on each worker")
    log_every: int = Field(50, ge=1, description="steps between two lines of progress")
    nonfinite_limit: int = Field(
        10, ge=1, description="steps in a row left out for a non-finite loss before the run stops"
    )


class CheckpointSettings(Settings):
    """When checkpoints are written and which are kept; all are scored on the development split."""

    every: int = Field(1000, ge=1, description="steps between checkpoints; the last step always writes one")
    keep_last: int = Field(3, ge=1, description="newest checkpoints whose weights are kept")
    keep_best: int = Field(3, ge=1, description="best checkpoints whose weights are kept")
    metric: Literal["psnr", "ssim", "lpips"] = Field("psnr", description="score that ranks checkpoints")
    weights: Literal["student", "averaged"] = Field("student", description="whose score ranks checkpoints")
    split: Literal["dev", "test"] = Field("dev", description="split whose scores rank checkpoints; test is refused")

    @field_validator("split")
    @classmethod
    def _test_split_does_not_choose(cls, split: str) -> str:
        if split == "test":
            raise ValueError(
                "checkpoints are not chosen by the test split: the best of 150 evaluations on the scored images "
                "flatters a run by 0.3 to 1.6 dB; leave it at dev, and score the chosen checkpoint once, at the end, "
                "with pipeline/evaluate.py --split test"
            )
        return split

    @property
    def higher_is_better(self) -> bool:
        """Whether a larger score is the better one."""
        return self.metric != "lpips"

    @property
    def ranking(self) -> str:
        """What the ranking score is called where it is shown."""
        return f"{self.split}_{self.weights}_{self.metric}"


class OptimizerSettings(Settings):
    """The optimizer (Adam), its schedule and its precision."""

    learning_rate: float = Field(2e-4, gt=0, description="peak learning rate")
    final_learning_rate: float = Field(1e-7, ge=0, description="learning rate at the end of the cosine")
    warmup_steps: int = Field(0, ge=0, description="steps of linear warm-up before the cosine")
    betas: tuple[float, float] = Field((0.9, 0.999), description="decay rates of Adam's two moments")
    clip: float = Field(
        0.0, ge=0, description="largest gradient norm; larger gradients are scaled to it; 0 is no limit"
    )
    precision: Literal["float32", "bf16"] = Field(
        "float32", description="bf16 runs the networks under autocast; weights, losses and the average stay float32"
    )
    zero_stage: int = Field(
        1, ge=0, description="DeepSpeed ZeRO stage: 0 shards nothing, 1 the optimizer state, 2 the gradients as well"
    )
    channels_last: bool = Field(False, description="lay feature maps out with channels last, often faster on GPUs")

    @field_validator("zero_stage")
    @classmethod
    def _stage_3_cannot_feed_the_average(cls, stage: int) -> int:
        if stage > 2:
            raise ValueError(
                "must be 0, 1 or 2: stage 3 shards the weights, which the teacher's average and its shared encoder "
                "read whole at every step, and a network of 10 M parameters gains nothing from it"
            )
        return stage

    @model_validator(mode="after")
    def _rates_fall(self) -> Self:
        if self.final_learning_rate > self.learning_rate:
            raise ValueError(f"final_learning_rate must not exceed learning_rate ({self.learning_rate})")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must lie in [0, 1): {list(self.betas)}")
        return self

    def rate_at(self, step: int, steps: int) -> float:
        """The learning rate of step ``step`` (from 0) of ``steps``: linear warm-up, then a cosine."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, steps - self.warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        return self.final_learning_rate + (self.learning_rate - self.final_learning_rate) * cosine
