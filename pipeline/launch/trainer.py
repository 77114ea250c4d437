"""Launches a run: checks everything that can be checked, then hands it to Ray Train."""

import json
import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.exceptions import RayError, RayTaskError
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig, ValidationConfig
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.constants import ENV_VARS_TO_PROPAGATE

from pipeline import interruption, storage, terminal
from pipeline.data.manifest import Manifest, load_manifest
from pipeline.evaluation.lpips_weights import BackboneWeights
from pipeline.evaluation.pool import Pool, Validation
from pipeline.evaluation.scorer import find_lpips
from pipeline.launch import capacity, preflight
from pipeline.launch.cluster import connect
from pipeline.launch.node_checks import check_nodes
from pipeline.run.checkpoint import PROVENANCE, SETTINGS, STOPPED, DamagedCheckpointError, set_aside
from pipeline.run.history import read_provenance, unscored
from pipeline.settings.config import Config, differences, read_settings
from pipeline.settings.evaluation import EvaluationSettings

SNAPSHOT = "checkpoint_manager_snapshot.json"  # Ray Train's list of a run's checkpoints, of which all must be there
# the git hash where the code lies without its git: in an environment variable of a job, in a file of an image
REVISION, REVISION_FILE = "IAML_REVISION", ".revision"
LIBRARIES = ("torch", "ray", "deepspeed", "numpy", "pillow")


class TrainingStoppedError(Exception):
    """Training gave up before its last step; the message says why."""


def check_data(config: Config) -> tuple[Manifest, ...]:
    """The manifests of ``config.data.urls``, once they are known to serve; ``ValueError`` with what to do otherwise."""
    manifests = tuple(load_manifest(url) for url in config.data.urls)
    preflight.check_data(config, manifests)
    return manifests


def check_scores(evaluation: EvaluationSettings, ranking: str | None = None) -> BackboneWeights | str:
    """The LPIPS weights, or why there are none, as is said in one line; refuses to rank by a missing score."""
    found = find_lpips(evaluation)
    if isinstance(found, str):
        if ranking == "lpips":
            raise ValueError(f"checkpoint.metric is lpips, but LPIPS is not available: {found}")
        terminal.say(f"no LPIPS: {found}")
    else:
        terminal.say(f"LPIPS {found.backbone} from {found.source} (sha256 {found.sha256})")
    return found


@contextmanager
def cluster(cpus: int, log: str | None, *, quiet: bool = False) -> Iterator[None]:
    """Within, Ray runs: the cluster that RAY_ADDRESS names, or one on this machine for the time being.

    On this machine Ray's count of CPUs is raised to the ``cpus`` that are asked for, since they may be shared.
    SIGTERM and Ctrl-C ask what runs within to make way, and end the process with ``interruption.STATUS``.

    Args:
        cpus: CPU cores that are needed.
        log: URL of the file for all that is not meant for the terminal; none keeps it only where something fails.
        quiet: leave what tasks and actors say to the log.

    Raises:
        ValueError: no Ray head answers at RAY_ADDRESS, or Ray can't start here.
        SystemExit: something failed in Ray that the caller has no answer to; says why in a line.
    """
    with terminal.session(log):
        connect(cpus)
        try:
            # Ray has put its own handlers in place by now
            with terminal.relay(shown=not quiet), interruption.made_way_for():
                yield
        except (RayError, ray.train.TrainingFailedError) as error:
            raise SystemExit(f"failed: {reason(error)}") from error
        finally:
            ray.shutdown()


def reason(error: Exception) -> str:
    """Why something failed in Ray, in one line for each cause."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, ray.train.WorkerGroupError):
        causes = {_last_line(failure) for failure in cause.worker_failures.values()}
        return "; ".join(sorted(causes))
    return _last_line(cause)


def check_cluster(config: Config, manifests: Sequence[Manifest]) -> None:
    """``ValueError`` when a node of the cluster lacks packages, data or storage; what is amiss is said of all nodes.

    Args:
        config: the run's settings, as ``capacity.with_devices`` gave them.
        manifests: of the data sets.
    """
    cache = config.data.cache if config.data.cache_gib else None
    check_nodes(manifests, config.run.storage, cache, use_gpu=bool(config.run.use_gpu))


def check_run(config: Config, provenance: dict[str, Any]) -> None:
    """Check that the run's storage can be used, and that a run of this name is the one to continue.

    Raises:
        ValueError: a run of this name has other settings or data, or its storage can't be read or written to.
    """
    url = config.run.url
    storage.check_writable(url)
    try:
        if storage.exists(storage.join(url, SETTINGS)):
            _refuse_another_run(config, provenance, url)
    except OSError as error:
        raise ValueError(f"{url}: cannot be read ({error})") from error


def claim(config: Config, provenance: dict[str, Any]) -> None:
    """Take the run's name by storing settings and provenance, unless they are there and the run is continued."""
    url = config.run.url
    known = storage.join(url, SETTINGS)
    if storage.exists(known):
        _refuse_another_run(config, provenance, url)  # it may have begun since it was checked
        for stale in (STOPPED, SNAPSHOT):
            storage.delete(storage.join(url, stale))
        return
    storage.write_text(storage.join(url, PROVENANCE), json.dumps(provenance, indent=2))
    storage.write_text(known, config.to_yaml())


def provenance_of(manifests: Sequence[Manifest], start: dict[str, Any] | None = None) -> dict[str, Any]:
    """What the weights come from besides the settings: code, data sets, libraries, and what ``find_start`` found."""
    return {
        **({"start_from": start} if start else {}),
        "git": _git_hash(),
        "data": [manifest.url for manifest in manifests],
        "manifest_sha256": [manifest.checksum for manifest in manifests],
        "libraries": {name: version(name) for name in LIBRARIES},
    }


def train(
    config: Config,
    manifests: Sequence[Manifest],
    provenance: dict[str, Any],
    lpips: BackboneWeights | str,
    lease_id: str,
) -> None:
    """Train a run that has been checked, on all data sets, scoring each checkpoint on the first one's.

    Returns when the last step is done and every checkpoint is scored.

    Args:
        config: its settings, as ``capacity.with_devices`` gave them.
        manifests: of the data sets.
        provenance: what ``provenance_of`` gave.
        lpips: what ``check_scores`` gave.
        lease_id: what ``lease.hold`` gave.

    Raises:
        TrainingStoppedError: training gave up before its last step.
        JobInterruptedError: the job is asked to make way; the same call continues.
        ray.train.TrainingFailedError: the run failed more often than ``run.max_failures`` allows.
    """
    claim(config, provenance)
    # checkpoints are chosen by the development split; the test split is scored by evaluate.py alone
    nodes = capacity.beside_training(config)
    pool = Pool.start(config.evaluation, manifests[0], config.checkpoint.split, lpips, nodes)
    validation = Validation(config, pool)
    stopped = storage.join(config.run.url, STOPPED)
    try:
        with _known_address():
            interruption.shielded(trainer(config, provenance, validation, lease_id).fit)
        interruption.check()
        # Ray forgets a checkpoint whose scoring was cut off together with its driver; others were scored elsewhere
        for url in unscored(config.run.url, config.evaluation.conditions):
            _score(validation, url)
    except ray.train.TrainingFailedError as error:
        if storage.exists(stopped):
            raise TrainingStoppedError(storage.read_text(stopped)) from error
        raise
    finally:
        pool.stop()
    if storage.exists(stopped):
        raise TrainingStoppedError(storage.read_text(stopped))


def trainer(config: Config, provenance: dict[str, Any], validation: Validation, lease_id: str) -> TorchTrainer:
    """Ray Train's trainer of a run."""
    from pipeline.training.loop import train  # brings DeepSpeed, which takes seconds and is not needed before

    filesystem, path = storage.arrow_filesystem(config.run.storage)
    return TorchTrainer(
        train,
        train_loop_config={"config": config.model_dump(mode="json"), "provenance": provenance, "lease": lease_id},
        scaling_config=ScalingConfig(
            num_workers=config.run.workers,
            use_gpu=bool(config.run.use_gpu),
            resources_per_worker={"CPU": config.run.cpus_per_worker, **({"GPU": 1} if config.run.use_gpu else {})},
        ),
        run_config=RunConfig(
            name=config.run.name,
            storage_path=path,
            storage_filesystem=filesystem,
            logging_config=LoggingConfig(log_level="WARNING"),
            failure_config=FailureConfig(max_failures=config.run.max_failures),
        ),
        # its own scheduling strategy keeps the task out of a placement group that this driver may run in
        validation_config=ValidationConfig(
            fn=validation, ray_remote_kwargs={"num_cpus": 0, "scheduling_strategy": "SPREAD"}
        ),
    )


def _score(validation: Validation, url: str) -> None:
    try:
        validation.score(url)
    except DamagedCheckpointError as error:
        terminal.say(f"{error}; this checkpoint is not scored")
        set_aside(url)


def _last_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__


@contextmanager
def _known_address() -> Iterator[None]:
    """Within, Ray Train tells its processes of this Ray; they would look for any on the machine, and find several."""
    before = os.environ.get("RAY_ADDRESS")
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    ENV_VARS_TO_PROPAGATE.add("RAY_ADDRESS")
    try:
        yield
    finally:
        ENV_VARS_TO_PROPAGATE.discard("RAY_ADDRESS")
        del os.environ["RAY_ADDRESS"]
        if before is not None:
            os.environ["RAY_ADDRESS"] = before


def _refuse_another_run(config: Config, provenance: dict[str, Any], url: str) -> None:
    before = Config.model_validate(read_settings(storage.join(url, SETTINGS)))
    found = [f"{name}: {old} before, {new} now" for name, old, new in differences(before.identity(), config.identity())]
    known = read_provenance(url)
    checksums = known.get("manifest_sha256", [])
    if checksums != provenance["manifest_sha256"]:
        shown = (
            ", ".join(one[:12] for one in several) or "unknown"
            for several in (checksums, provenance["manifest_sha256"])
        )
        found.append("data: manifest {} before, {} now".format(*shown))
    starts = [each.get("start_from", {}).get("sha256", {}) for each in (known, provenance)]
    if starts[0] != starts[1]:
        shown = (", ".join(one[:12] for one in each.values()) or "nothing" for each in starts)
        found.append("run.start_from: weights {} before, {} now".format(*shown))
    if found:
        others = f", and --run.start-from {url} to begin with its weights" if before.network == config.network else ""
        raise ValueError(
            f"{url}: a run of this name exists with other settings or data; choose another run.name{others}\n  "
            + "\n  ".join(found)
        )


def _git_hash() -> str:
    file = Path(__file__).parents[2] / REVISION_FILE
    recorded = os.environ.get(REVISION) or (file.read_text().strip() if file.exists() else "")
    if recorded:
        return recorded
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown (not a git checkout)"
