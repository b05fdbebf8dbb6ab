"""Callbacks are told of a purification from start to end, and trackers keep what it says."""

from __future__ import annotations

import sys

import pytest
from commands import fitted_net, small_images
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import mmdefense as mmd
from mmdefense.errors import UnsupportedError
from mmdefense.runtime.callbacks import Callback
from mmdefense_adapters.tracking import MLflow, TensorBoard, WandB


class Notebook(Callback):
    def __init__(self) -> None:
        self.said: list[tuple] = []

    def on_start(self, settings):
        self.said.append(("start", settings))

    def on_stage(self, event):
        self.said.append(("stage", event.stage))

    def on_step(self, event):
        self.said.append(("step", event.stage, event.step, dict(event.values)))

    def on_evaluate(self, values):
        self.said.append(("evaluate", values))

    def on_end(self, error):
        self.said.append(("end", error))

    def kinds(self) -> list[str]:
        return [kind for kind, *_ in self.said]


def purify(*callbacks, steps=40, **more):
    return mmd.purify(
        fitted_net(),
        small_images(),
        "fine-tuning",
        steps=steps,
        progress=False,
        evidence="none",
        callbacks=callbacks,
        **more,
    )


def losses(purified) -> dict[int, float]:
    return {
        entry["step"]: entry["loss"]
        for entry in purified.result.history
        if entry["stage"] == "fine-tune" and "loss" in entry
    }


def test_a_callback_is_told_all_in_order():
    notebook = Notebook()
    purified = purify(notebook)
    kinds = notebook.kinds()
    assert (kinds[0], kinds[1], kinds[-2], kinds[-1]) == ("start", "stage", "evaluate", "end")
    assert notebook.said[0][1]["defense"] == "fine-tuning"
    assert notebook.said[0][1]["steps"] == 40
    told = {step: v["loss"] for kind, *rest in notebook.said if kind == "step"
            for stage, step, v in [rest] if stage == "fine-tune" and "loss" in v}  # fmt: skip
    assert told == losses(purified)
    stages = [rest[0] for kind, *rest in notebook.said if kind == "stage"]
    assert {"utility before", "fine-tune", "guard"} <= set(stages)
    assert notebook.said[-2][1]["utility_after"] == purified.guard.after
    assert notebook.said[-1] == ("end", None)


def test_callbacks_change_nothing_and_progress_is_still_told():
    events = []
    alone, told = purify(), purify(Notebook(), Notebook())
    assert all(
        a.equal(b)
        for a, b in zip(
            alone.model.state_dict().values(), told.model.state_dict().values(), strict=True
        )
    )
    mmd.purify(
        fitted_net(), small_images(), "fine-tuning", steps=2, progress=events.append,
        callbacks=[Notebook()],
    )  # fmt: skip
    assert any(event.stage == "fine-tune" for event in events)


def test_the_end_is_told_with_what_went_wrong():
    class Stopping(Callback):
        def on_step(self, event):
            raise KeyboardInterrupt

    notebook = Notebook()
    with pytest.raises(KeyboardInterrupt):
        purify(notebook, Stopping())
    assert notebook.kinds()[-1] == "end"
    assert isinstance(notebook.said[-1][1], KeyboardInterrupt)
    assert "evaluate" not in notebook.kinds()


def test_tensorboard_reads_what_was_written(tmp_path):
    purified = purify(TensorBoard(tmp_path / "runs"))
    read = EventAccumulator(str(tmp_path / "runs")).Reload()
    written = {event.step: event.value for event in read.Scalars("fine-tune/loss")}
    assert written == pytest.approx(losses(purified), rel=1e-5)
    (after,) = read.Scalars("result/utility_after")
    assert after.value == pytest.approx(purified.guard.after)
    assert any(tag.startswith("settings") for tag in read.Tags()["tensors"])


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'runs.db'}"


def client_of(store):
    from mlflow.tracking import MlflowClient  # takes seconds to import

    return MlflowClient(store)


def test_mlflow_keeps_settings_values_and_result(store):
    tracker = MLflow("signs", tracking_uri=store, run_name="first")
    purified = purify(tracker)
    client = client_of(store)
    run = client.get_run(tracker.run_id)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "first")
    assert run.data.params["defense"] == "fine-tuning"
    assert run.data.params["steps"] == "40"
    written = client.get_metric_history(tracker.run_id, "fine-tune/loss")
    assert {metric.step: metric.value for metric in written} == losses(purified)
    assert run.data.metrics["result/utility_after"] == purified.guard.after


def test_an_mlflow_run_that_broke_is_marked(store):
    class Broken(Callback):
        def on_step(self, event):
            raise ValueError("it breaks")

    tracker = MLflow("signs", tracking_uri=store)  # the experiment is there by now
    with pytest.raises(ValueError, match="it breaks"):
        purify(tracker, Broken())
    assert client_of(store).get_run(tracker.run_id).info.status == "FAILED"


class Run:
    """Stands for a run of W&B, which needs an account."""

    def __init__(self) -> None:
        self.config, self.summary, self.logged, self.code = {}, {}, [], None

    def log(self, values):
        self.logged.append(values)

    def finish(self, exit_code):
        self.code = exit_code


def test_a_wandb_run_that_is_given_stays_open():
    run = Run()
    purified = purify(WandB(run))
    assert run.config["defense"] == "fine-tuning"
    told = {v["fine-tune/step"]: v["fine-tune/loss"] for v in run.logged if "fine-tune/loss" in v}
    assert told == losses(purified)
    assert run.summary["result/utility_after"] == purified.guard.after
    assert run.code is None


@pytest.mark.parametrize(
    ("make", "module"),
    [
        (lambda: MLflow(), "mlflow"),
        (lambda: WandB(), "wandb"),
        (lambda: TensorBoard("x"), "torch.utils.tensorboard"),
    ],
)
def test_without_its_library_a_tracker_says_what_to_install(make, module, monkeypatch):
    for name in [name for name in sys.modules if name.startswith(f"{module}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UnsupportedError, match=r"writing to .* needs the package"):
        make()
