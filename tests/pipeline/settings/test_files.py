"""Settings from presets, files and options."""

import pytest
import yaml
from command_lines import URL, parsed
from pydantic import ValidationError

from pipeline.settings.files import preset_names, read_settings


@pytest.mark.parametrize("name", ["demo", "lol_v1", "lol_v2_real", "lol_v2_synthetic"])
def test_presets_build(name):
    assert name in preset_names()
    assert parsed("--config", name, *URL).run.name == name


def test_any_field_can_be_overridden():
    config = parsed(
        "--config", "lol_v1", *URL, "--train.steps", "7", "--objective.scale-weights", "[0.1, 0.2, 0.3, 0.4]",
        "--optimizer.learning_rate=1e-3", "--run.use-gpu", "false", "--teacher.norm", "separate",
    )  # fmt: skip
    assert config.train.steps == 7
    assert config.objective.scale_weights == (0.1, 0.2, 0.3, 0.4)
    assert config.optimizer.learning_rate == 1e-3
    assert config.run.use_gpu is False
    assert config.teacher.norm == "separate"


def test_resolved_settings_read_back_the_same(tmp_path):
    config = parsed("--config", "demo", "--network.head", "sigmoid")
    path = tmp_path / "settings.yaml"
    path.write_text(config.to_yaml())
    assert parsed("--config", str(path)) == config


def test_unknown_fields_in_a_file_are_refused(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text(yaml.safe_dump(read_settings_of("demo") | {"trian": {"steps": 1}}))
    with pytest.raises(ValidationError, match="trian"):
        parsed("--config", str(path))


def read_settings_of(preset):
    return parsed("--config", preset, *URL).model_dump(mode="json")


def test_settings_file_must_be_a_mapping(tmp_path):
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(ValueError, match="must hold settings by name"):
        read_settings(str(tmp_path / "list.yaml"))
