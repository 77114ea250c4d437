"""The run: its name, where it is stored, and what it runs on."""

from pydantic import Field

from iaml.settings import Seed, Settings
from pipeline.storage import Url, join


class RunSettings(Settings):
    """The run: its name, where it is stored, and what it runs on."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="name of the run; the same name resumes it, a new name starts a new one",
    )
    root: Url = Field(
        "~/iaml-runs", description="folder or s3://bucket/prefix that holds the runs; shared by all nodes"
    )
    start_from: Url | None = Field(
        None,
        description="run (its best checkpoint), checkpoint or student.safetensors that a new run takes student and "
        "teacher from; optimizer, schedule and data are its own",
    )
    workers: int = Field(1, ge=1, description="training workers, one for each GPU where GPUs are used")
    use_gpu: bool | None = Field(None, description="train on GPUs; by default if the cluster has one for each worker")
    cpus_per_worker: int | None = Field(
        None,
        ge=1,
        description="CPU cores and compute threads of each worker; by default all that evaluation actors and runs at "
        "the same time leave, with a GPU one more than data.threads at most",
    )
    seed: Seed = Field(0, description="fixes initial weights, sample order and augmentation")
    max_failures: int = Field(3, ge=0, description="lost workers or nodes after which the run gives up")
    wait_s: float | None = Field(
        None,
        ge=0,
        description="seconds to wait for nodes that the run needs and the cluster lacks so far; by default 600 where "
        "Ray's autoscaler (version 2) brings nodes, else 0",
    )

    @property
    def url(self) -> str:
        """Where this run is stored."""
        return join(self.root, self.name)
