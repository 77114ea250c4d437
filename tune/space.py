"""The space that a search varies: parameters as Optuna draws them, and the run's settings that follow from them.

Scale weights are drawn as one relative weight for each scale and made proportions; the EMA rate m as 1 - m.
"""

from collections.abc import Mapping

from optuna.distributions import FloatDistribution

from iaml.network import SCALES
from pipeline.settings.config import Config
from tune.settings import VARIED, SearchConfig

SHARES = tuple(f"scale_{scale + 1}" for scale in range(SCALES))  # coarsest first
HORIZON = "1 - ema_rate"
DIGITS = 4  # significant ones of a drawn value, so that settings can be read
Parameters = Mapping[str, float]


def distributions(config: SearchConfig) -> dict[str, FloatDistribution]:
    """What Optuna draws from, by parameter."""
    found: dict[str, FloatDistribution] = {}
    for name in VARIED:
        limits = getattr(config.search, name)
        if limits is None:
            continue
        if name == "scale_weights":
            found |= {share: FloatDistribution(limits[0], limits[1], log=True) for share in SHARES}
        elif name == "ema_rate":
            found[HORIZON] = FloatDistribution(_round(1 - limits[1]), _round(1 - limits[0]), log=True)
        else:
            found[name] = FloatDistribution(limits[0], limits[1], log=name != "beta")
    return found


def initial_parameters(config: SearchConfig) -> dict[str, float]:
    """The parameters of the first trial, whose settings are the search's own: the paper's."""
    found: dict[str, float] = {}
    for name, (part, field) in VARIED.items():
        value = getattr(getattr(config, part), field)
        if getattr(config.search, name) is None:
            continue
        if name == "scale_weights":
            found |= dict.fromkeys(SHARES, 1.0)
        else:
            found |= {HORIZON: _round(1 - value)} if name == "ema_rate" else {name: value}
    return found


def notes(config: SearchConfig) -> list[str]:
    """A sentence on the part of the space that makes no difference, if there is one."""
    # m_t = min(m, 1 - (1 + t)^-p), and the last update is t = steps - 1
    reached = 1 - config.train.steps**-config.teacher.ema_warmup
    if not config.search.ema_rate or config.teacher.ema_warmup == 0 or reached >= config.search.ema_rate[1]:
        return []
    return [
        f"EMA rates above {reached:.4g} all act as it does: in {config.train.steps} steps the warm-up "
        "(teacher.ema_warmup) comes no further"
    ]


def run_settings(config: SearchConfig, parameters: Parameters, name: str, seed: int) -> Config:
    """The settings of the run ``name`` with these parameters, stored in the search's folder."""
    settings = config.model_dump(mode="json", include=set(Config.model_fields))
    for varied, (part, field) in VARIED.items():
        if varied in parameters:
            value = parameters[varied]  # the first trial's is the search's own, whatever its digits
            settings[part][field] = value if value == settings[part][field] else _round(value)
    if HORIZON in parameters:
        settings["teacher"]["ema_rate"] = round(1 - _round(parameters[HORIZON]), 15)
    if SHARES[0] in parameters:
        whole = sum(parameters[share] for share in SHARES)
        settings["objective"]["scale_weights"] = [_round(parameters[share] / whole) for share in SHARES]
    settings["run"].update(name=name, root=config.url, seed=seed)
    return Config.model_validate(settings)


def _round(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
