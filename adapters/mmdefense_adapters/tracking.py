"""Callbacks that write a purification to TensorBoard, MLflow or Weights & Biases."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmdefense.libraries import needed
from mmdefense.report.encoding import plain
from mmdefense.runtime.callbacks import Callback
from mmdefense.runtime.run import Event

__all__ = ["MLflow", "TensorBoard", "WandB"]


class TensorBoard(Callback):
    """Writes each value as a scalar ``stage/name``, and the result under ``result/``.

    Args:
        folder: Where the event files go; ``tensorboard --logdir`` reads it.

    Raises:
        UnsupportedError: If ``tensorboard`` is not installed.

    Example:
        >>> import mmdefense as mmd
        >>> board = TensorBoard("runs/a")
        >>> purified = mmd.purify(model, (images, labels), "fine-tuning", callbacks=[board])
    """

    def __init__(self, folder: str | Path) -> None:
        with needed("writing to TensorBoard", "tensorboard"):
            from torch.utils.tensorboard import SummaryWriter
        self._writer: Any = SummaryWriter(str(folder))

    def on_start(self, settings: Mapping[str, Any]) -> None:
        """Write the settings as text."""
        self._writer.add_text("settings", f"```json\n{json.dumps(plain(settings), indent=1)}\n```")

    def on_step(self, event: Event) -> None:
        """Write the values of a step."""
        for name, value in event.values.items():
            self._writer.add_scalar(f"{event.stage}/{name}", value, event.step)

    def on_evaluate(self, values: Mapping[str, float]) -> None:
        """Write what was measured of the result."""
        for name, value in values.items():
            self._writer.add_scalar(f"result/{name}", value)

    def on_end(self, error: BaseException | None) -> None:
        """Close the files."""
        self._writer.close()


class MLflow(Callback):
    """Creates a run with the settings as parameters and the values as metrics.

    The run ends as ``FINISHED`` or, after an error, as ``FAILED``.

    Args:
        experiment: The name of the experiment, created if it does not exist.
        tracking_uri: The store, such as ``"sqlite:///mlflow.db"`` or the address of a server; by
            default MLflow's own.
        run_name: The name of the run; by default chosen by MLflow.

    Raises:
        UnsupportedError: If ``mlflow`` is not installed.

    Attributes:
        run_id: The id of the run, once the purification has started.
    """

    def __init__(
        self,
        experiment: str = "mmdefense",
        tracking_uri: str | None = None,
        run_name: str | None = None,
    ) -> None:
        with needed("writing to MLflow", "mlflow-skinny"):
            from mlflow.tracking import MlflowClient
        self._client: Any = MlflowClient(tracking_uri)
        self._experiment, self._name = experiment, run_name
        self.run_id = ""

    def on_start(self, settings: Mapping[str, Any]) -> None:
        """Create the run, and log the settings."""
        found = self._client.get_experiment_by_name(self._experiment)
        place = found.experiment_id if found else self._client.create_experiment(self._experiment)
        self.run_id = self._client.create_run(place, run_name=self._name).info.run_id
        for name, value in settings.items():
            self._client.log_param(self.run_id, name, value)

    def on_step(self, event: Event) -> None:
        """Log the values of a step."""
        for name, value in event.values.items():
            self._client.log_metric(self.run_id, _key(event.stage, name), value, step=event.step)

    def on_evaluate(self, values: Mapping[str, float]) -> None:
        """Log what was measured of the result."""
        for name, value in values.items():
            self._client.log_metric(self.run_id, _key("result", name), value)

    def on_end(self, error: BaseException | None) -> None:
        """End the run."""
        if self.run_id:
            self._client.set_terminated(self.run_id, "FAILED" if error else "FINISHED")


class WandB(Callback):
    """Logs the settings as the config of a run, the values, and the result in its summary.

    Args:
        run: A run from ``wandb.init``; by default one is started with the purification and finished
            at its end.
        **options: Arguments of ``wandb.init``, such as ``project="mmdefense"``.

    Raises:
        UnsupportedError: If no run is given and ``wandb`` is not installed.
    """

    def __init__(self, run: Any = None, **options: Any) -> None:
        self._run, self._options, self._own = run, options, run is None
        if run is None:
            with needed("writing to Weights & Biases", "wandb"):
                import wandb
            self._init = wandb.init

    def on_start(self, settings: Mapping[str, Any]) -> None:
        """Start a run if none was given, and log the settings."""
        if self._own:
            self._run = self._init(**self._options)
        self._run.config.update(plain(settings))

    def on_step(self, event: Event) -> None:
        """Log the values of a step; each stage counts its own steps."""
        if event.values:
            named = {f"{event.stage}/{name}": value for name, value in event.values.items()}
            self._run.log({**named, f"{event.stage}/step": event.step})

    def on_evaluate(self, values: Mapping[str, float]) -> None:
        """Log what was measured of the result."""
        self._run.summary.update({f"result/{name}": value for name, value in values.items()})

    def on_end(self, error: BaseException | None) -> None:
        """Finish the run, if it was not given."""
        if self._own and self._run is not None:
            self._run.finish(exit_code=1 if error else 0)


def _key(stage: str, name: str) -> str:
    """Return the name of a metric in characters that MLflow allows."""
    return re.sub(r"[^\w\-. /]", "_", f"{stage}/{name}")
