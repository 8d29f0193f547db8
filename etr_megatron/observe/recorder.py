"""Record a finished step's metrics, on the one rank that writes them."""

from __future__ import annotations

from contextlib import ExitStack
from types import TracebackType
from typing import cast

from etr_megatron.config import Config
from etr_megatron.observe.metrics import MetricsRow
from etr_megatron.observe.progress import Progress
from etr_megatron.observe.run_directory import RunDirectory
from etr_megatron.observe.writers import open_writers


class Recorder:
    """Writes metrics.jsonl, then TensorBoard and W&B, then the progress bar.

    directory.truncate_after(step=25)
    with Recorder(config, directory, resumed_at=25) as recorder:
        recorder.record(row)
    """

    def __init__(self, config: Config, directory: RunDirectory, resumed_at: int = 0) -> None:
        """Open everything that `config.observe` asks for; `resumed_at` is the last step kept, 0 for a new run."""
        self._metrics = directory.metrics
        with ExitStack() as opened:
            self._writers = open_writers(config, directory, resumed_at)
            for writer in self._writers:
                opened.callback(writer.close)
            self._progress = Progress(config.run.steps, resumed_at) if config.observe.progress else None
            if self._progress is not None:
                opened.callback(self._progress.close)
            self._opened = opened.pop_all()

    def record(self, row: MetricsRow) -> None:
        """Append the row and show it; raises what `MetricsLog.append` raises."""
        self._metrics.append(row)
        for writer in self._writers:
            writer.write(row)
        if self._progress is not None:
            self._progress.update(row)

    def lacks(self, step: int, key: str) -> bool:
        """Whether the last row is of `step` and has no `key`."""
        row = self._metrics.last()
        return row is not None and row["step"] == step and key not in row

    def complete(self, step: int, values: dict[str, float]) -> None:
        """Add values that became known later to the last row, which must be of `step`."""
        self._metrics.complete(step, values)
        for writer in self._writers:
            writer.write(cast(MetricsRow, {"step": step, **values}))

    def close(self) -> None:
        """Flush and close. Idempotent."""
        self._opened.close()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()
