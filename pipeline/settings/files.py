"""Settings from presets, YAML files and the command line, which overrides them."""

import argparse
from pathlib import Path
from typing import Any, TypeVar

from pipeline import storage
from pipeline.settings import command_line, plain_yaml
from pipeline.settings.config import Config

PRESETS = Path(__file__).parent / "presets"
AnyConfig = TypeVar("AnyConfig", bound=Config)


def preset_names() -> list[str]:
    """The presets that ``--config`` knows by name."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def parse_config(
    parser: argparse.ArgumentParser, model: type[AnyConfig], argv: list[str] | None = None
) -> tuple[AnyConfig, dict[str, Any]]:
    """The settings from ``--config`` overridden by options; also the options that ``parser`` had of its own."""
    parser.add_argument(
        "--config", required=True, metavar="NAME|FILE", help=f"a preset ({', '.join(preset_names())}) or a YAML file"
    )
    command_line.add_options(parser, model)
    options = vars(parser.parse_args(command_line.normalise(argv)))
    base = read_settings(_settings_file(options.pop("config")))
    overrides = {name: value for name, value in options.items() if "." in name}
    parts: dict[str, Any] = {name: {} for name in model.model_fields}  # so that a missing field is named in full
    settings = _merge(_merge(parts, base), command_line.nest(overrides))
    return model.model_validate(settings), {name: options[name] for name in options.keys() - overrides.keys()}


def read_settings(url: str) -> dict[str, Any]:
    """The mapping in a YAML file, values as they were written; ``ValueError`` naming the file when there is none."""
    try:
        text = storage.read_text(url)
    except FileNotFoundError as error:
        raise ValueError(f"{url}: no such settings file ({error})") from error
    except OSError as error:
        raise ValueError(f"{url}: cannot be read ({error})") from error
    try:
        settings = plain_yaml.load(text)
    except ValueError as error:
        raise ValueError(f"{url}: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{url}: must hold settings by name, such as 'train: {{steps: 1000}}'")
    return settings


def _settings_file(name: str) -> str:
    preset = PRESETS / f"{name}.yaml"
    if preset.exists():
        return str(preset)
    if not name.endswith((".yaml", ".yml")):
        raise ValueError(f"--config {name}: not a preset ({', '.join(preset_names())}) nor a .yaml file")
    return name


def _merge(base: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for name, value in overrides.items():
        below = merged.get(name)
        merged[name] = _merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged
