"""What rank 0 shows of a run: lines in the terminal, TensorBoard, a metrics file, and Prometheus.

<run>/metrics.jsonl     one record for each logged step
<run>/tensorboard/      the same as TensorBoard events
"""

import json
import tempfile
import time
from pathlib import Path

from torch.utils.tensorboard.writer import SummaryWriter

from pipeline import storage, terminal
from pipeline.run.record import EVENTS, METRICS, read_metrics
from pipeline.telemetry import Telemetry


class Monitor:
    """Records the metrics of a run; a resumed run drops the records past the step that it resumes from.

    Args:
        run: the run's URL.
        steps: steps of the whole run, for the remaining time.
        start: step that the run resumes from.
        global_batch: pairs in one step.
    """

    def __init__(self, run: str, steps: int, start: int, global_batch: int) -> None:
        self._run = run
        self._steps = steps
        self._global_batch = global_batch
        self._records = [record for record in read_metrics(run) if record["step"] <= start]
        self._events = _event_folder(run)
        self._writer = SummaryWriter(str(self._events), purge_step=start + 1)
        self._since = (time.monotonic(), start)
        self._telemetry = Telemetry(run=storage.name_of(run))

    def record(self, step: int, metrics: dict[str, float]) -> None:
        """Show and keep the metrics of the steps up to ``step`` since the last record."""
        (before, first), now = self._since, time.monotonic()
        self._since = (now, step)
        rate = (step - first) / (now - before)
        record = {"step": step, **metrics, "images_per_s": rate * self._global_batch}
        self._records.append(record)
        self._telemetry.record(record)
        for name, value in record.items():
            if name != "step":
                self._writer.add_scalar(name, value, step)
        remaining = (self._steps - step) / rate
        values = "  ".join(f"{name} {value:.4g}" for name, value in record.items() if name != "step")
        done, eta = f"step {step}/{self._steps}", f"ETA {remaining // 60:.0f}m{remaining % 60:02.0f}s"
        loss = f"  loss {metrics['loss']:.3g}" if "loss" in metrics else ""
        live = f"{done}{loss}  {record['images_per_s']:.3g} images/s  {eta}"
        terminal.log(f"{done}  {values}  {eta}", live=live)

    def note_checkpoint(self, step: int) -> None:
        """A checkpoint that is to be scored has been written."""
        self._telemetry.record({"checkpoint_step": step})

    def save(self) -> None:
        """Write the records so far to the run's storage, whole; another thread may record more meanwhile."""
        lines = "".join(json.dumps(record) + "\n" for record in tuple(self._records))
        storage.write_text(storage.join(self._run, METRICS), lines)
        self._writer.flush()
        if not storage.is_local(self._run):
            for path in self._events.iterdir():
                storage.write_bytes(storage.join(self._run, EVENTS, path.name), path.read_bytes())

    def close(self) -> None:
        """Save and stop."""
        self.save()
        self._writer.close()


def _event_folder(run: str) -> Path:
    if storage.is_local(run):
        return Path(storage.join(run, EVENTS))
    return Path(tempfile.mkdtemp(prefix="tensorboard-"))
