"""The ablations of the method: what each part of it is worth, over seeds.

Each arm is the reference with one thing changed; all else, the sample order included, is the same for all arms.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from iaml import ObjectiveSettings
from iaml.network import SCALES
from pipeline.settings.config import Config

REFERENCE = "reference"
DEFAULTS = ObjectiveSettings()
# what has no effect without the mirror loss must not be set
NO_MIRROR = {"mirror_weight": 0.0} | DEFAULTS.model_dump(include={"scale_weights", "beta", "gamma"})
ARMS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    REFERENCE: {},
    "no-mirror": {"objective": NO_MIRROR},
    "reconstruction-only": {"objective": NO_MIRROR | {"ssim_weight": 0.0}},
    "no-illumination": {"objective": {"beta": 0.0, "gamma": DEFAULTS.gamma}},
    **{
        f"scale-{scale + 1}-only": {"objective": {"scale_weights": [float(index == scale) for index in range(SCALES)]}}
        for scale in range(SCALES)
    },
    "no-ema": {"teacher": {"ema_rate": 0.0}},
    "frozen-teacher": {"teacher": {"ema_rate": 1.0}},
    **{f"norm-{norm}": {"teacher": {"norm": norm}} for norm in ("running", "batch", "separate")},
}


def configs_of(base: Config, arms: Sequence[str], seeds: Sequence[int]) -> list[Config]:
    """A run's settings for each arm and seed, the reference first, stored below ``<base.run.url>``.

    Arms that change nothing of the base are left out, since the reference is them.

    Raises:
        ValueError: the base has a seed of its own, which would have no effect.
    """
    if base.run.seed:
        raise ValueError(f"run.seed ({base.run.seed}) has no effect on ablations: give --seeds, and leave it at 0")
    configs = []
    for arm in dict.fromkeys([REFERENCE, *arms]):
        settings = base.model_dump(mode="json")
        for part, changes in ARMS[arm].items():
            settings[part].update(changes)
        if arm != REFERENCE and Config.model_validate(settings) == base:
            continue
        for seed in dict.fromkeys(seeds):
            settings["run"].update(name=f"{arm}-seed{seed}", root=base.run.url, seed=seed)
            configs.append(Config.model_validate(settings))
    return configs
