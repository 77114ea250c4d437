"""The training loop on one worker, without a cluster."""

from datasets import packed
from local_training import train

from pipeline.settings.config import Config

STEPS = 20


def settings_of(folder, data):
    settings = {
        "run": {"name": "run", "root": str(folder)},
        "data": {"url": data, "crop": 32, "cache_gib": 0},
        "network": {"width": 1 / 16},
        "optimizer": {"learning_rate": 1e30, "warmup_steps": 0},
        "train": {"steps": STEPS, "nonfinite_limit": 3, "log_every": 1},
    }
    return Config.model_validate(settings)


def test_what_the_user_must_change_ends_the_run_with_the_reason_in_one_line(tmp_path):
    settings = settings_of(tmp_path, "/data")
    older = tmp_path / "run/checkpoint-00000002"
    older.mkdir(parents=True)
    for name in ("student.safetensors", "teacher.safetensors", "optimizer.safetensors"):
        (older / name).touch()
    (older / "state.json").write_text('{"step": 2}')
    train(settings)
    assert (tmp_path / "run/stopped.txt").read_text() == (
        f"{older}: state.json has no checksums, as an older version of this program wrote it; resume the run with "
        "that version"
    )
    (older / "state.json").unlink()  # whatever the next workers would find, they leave it at that
    assert train(settings).printed == ""


def test_a_loss_that_stays_not_finite_stops_the_run_with_the_reason(tmp_path):
    printed = train(settings_of(tmp_path, packed(tmp_path / "pairs"))).printed
    assert printed.count("skipped: the loss or its gradient is not finite") == 3
    assert (tmp_path / "run/stopped.txt").read_text().startswith("3 steps in a row (train.nonfinite_limit)")
    assert f"step {STEPS}/" not in printed
