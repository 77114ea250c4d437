"""Which photographs become pairs, and how dark."""

from typing import Self

from pydantic import Field, model_validator

from iaml.settings import Seed, Settings
from pipeline.storage import LocalPath


class CameraSettings(Settings):
    """How dark and how noisy the images become; ranges are drawn from anew for every image."""

    least_stops: float = Field(3, description="Least underexposure in stops; each halves the light.", ge=0, le=12)
    most_stops: float = Field(5, description="Most underexposure in stops.", ge=0, le=12)
    least_full_well: float = Field(
        2000, description="Fewest electrons that make white: the lower, the more shot noise.", ge=1
    )
    most_full_well: float = Field(12000, description="Most electrons that make white.", ge=1)
    read_noise: float = Field(3, description="Standard deviation of the read noise in electrons.", ge=0)
    colour_cast: float = Field(
        0.15, description="Red and blue are each amplified by exp(u), u uniform within this of 0.", ge=0, le=1
    )
    bits: int = Field(12, description="Bits to which the sensor's linear values are quantised.", ge=6, le=16)

    @model_validator(mode="after")
    def _ranges_are_in_order(self) -> Self:
        for least, most in (("least_stops", "most_stops"), ("least_full_well", "most_full_well")):
            if getattr(self, least) > getattr(self, most):
                raise ValueError(f"{least} {getattr(self, least)} exceeds {most} {getattr(self, most)}")
        return self


class DarkenSettings(Settings):
    """Which photographs are darkened, where the pairs go, and by what camera."""

    source: LocalPath = Field(description="Folder of photographs, at its root or in train and test folders.")
    out: LocalPath = Field(description="New or empty folder for the pairs, in low and high folders.")
    variants: int = Field(1, description="Dark images made of each photograph.", ge=1)
    max_side: int | None = Field(
        None, description="Photographs with a longer side, in pixels, are scaled down to it first.", ge=16
    )
    seed: Seed = Field(0, description="With a photograph's relative path and the variant, it decides the noise.")
    camera: CameraSettings = CameraSettings()


class PhotographSettings(Settings):
    """Where the photographs go."""

    out: LocalPath = Field(description="New or empty folder to write train/ and test/ photographs to.")
