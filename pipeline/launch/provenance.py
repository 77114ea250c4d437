"""What the weights of a run come from: code, data, libraries, and the weights that it begins with, if others'."""

import os
import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from iaml import AutoEncoder, NetworkSettings
from iaml.network import ENCODER_CHANNELS
from pipeline import storage
from pipeline.data.manifest import Manifest
from pipeline.run import checkpoint
from pipeline.run.checkpoint import SETTINGS
from pipeline.run.history import Run, best_checkpoint
from pipeline.run.record import read_provenance
from pipeline.settings.config import Config

# the git hash where the code lies without its git: in an environment variable of a job, in a file of an image
REVISION, REVISION_FILE = "IAML_REVISION", ".revision"
LIBRARIES = ("torch", "ray", "deepspeed", "numpy", "pillow")
FIRST = "encoder.levels.0.0.weight"  # the layer whose channels tell the width


def collect_provenance(manifests: Sequence[Manifest], start: dict[str, Any] | None = None) -> dict[str, Any]:
    """What the weights come from besides the settings: code, data, libraries, what ``find_initial_weights`` found."""
    return {
        **({"start_from": start} if start else {}),
        "git": _git_hash(),
        "data": [manifest.url for manifest in manifests],
        "manifest_sha256": [manifest.checksum for manifest in manifests],
        "libraries": {name: version(name) for name in LIBRARIES},
    }


def find_initial_weights(config: Config) -> dict[str, Any] | None:
    """What ``run.start_from`` names, as provenance records it; none where it is not set.

    A run that has begun keeps what it began with, wherever that lies by now and whatever its source has become.

    Returns:
        ``url`` of a checkpoint or file, and ``sha256`` of its weights by file.

    Raises:
        ValueError: nothing is there, or its network is another one.
    """
    given = config.run.start_from
    if given is None:
        return None
    settings = storage.join(config.run.url, SETTINGS)
    if storage.exists(settings) and checkpoint.read_config(config.run.url).run.start_from == given:
        recorded: dict[str, Any] | None = read_provenance(config.run.url).get("start_from")
        return recorded
    url = best_checkpoint(Run.load(given)) if checkpoint.kind_of(given) == "run" else given
    weights = checkpoint.read_networks(url)
    _check_network(url, weights, config.network)
    return {"url": url, "sha256": dict(weights.sha256)}


def _check_network(url: str, weights: checkpoint.Networks, network: NetworkSettings) -> None:
    with torch.device("meta"):
        wanted = {name: value.shape for name, value in AutoEncoder(network).state_dict().items()}
    found = {name: value.shape for name, value in weights.student.items()}
    theirs = _network_beside(url)
    if theirs is None and found.keys() == wanted.keys():
        width = round(found[FIRST][0] / ENCODER_CHANNELS[0], 4)
        theirs = network.model_copy(update={} if found == wanted else {"width": width})
    if theirs is None or (found != wanted and theirs == network):
        raise ValueError(f"run.start_from: {url}: these are not the weights of this network, an iaml.AutoEncoder")
    if theirs != network:
        raise ValueError(
            f"run.start_from: {url}: its network has width {theirs.width} and head {theirs.head}, this run's has width "
            f"{network.width} and head {network.head}; give --network.width {theirs.width} --network.head {theirs.head}"
        )


def _network_beside(url: str) -> NetworkSettings | None:
    folder = url if checkpoint.kind_of(url) else url.rpartition("/")[0]
    return checkpoint.read_config(folder).network if storage.exists(storage.join(folder, SETTINGS)) else None


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
