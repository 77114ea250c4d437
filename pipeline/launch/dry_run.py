"""Dry runs: a few steps under a name that no other run can have, and nothing left of them."""

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pipeline import storage
from pipeline.settings.config import Config


@contextmanager
def throwaway_run(config: Config, steps: int, **run: Any) -> Iterator[Config]:
    """Within, the settings of a run of ``steps`` steps that logs each of them; its folder is deleted afterwards.

    Args:
        config: settings of a whole run.
        steps: how many to take instead.
        run: settings of ``run`` to change.
    """
    settings = config.model_dump(mode="json", include=set(Config.model_fields))
    settings["run"].update(name=f"dry-run-{config.run.name}-{uuid.uuid4().hex}", **run)
    settings["train"].update(steps=steps, log_every=1)
    settings["optimizer"]["warmup_steps"] = 0
    short = Config.model_validate(settings)
    storage.check_writable(short.run.root)
    try:
        yield short
    finally:
        storage.delete_folder(short.run.url)
