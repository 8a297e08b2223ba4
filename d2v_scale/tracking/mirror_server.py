"""What an MLflow server says no to: the run, its experiment, a value, or everything."""

from collections.abc import Callable
from typing import Any

KEY_TAG = "d2v.job"
_INVALID = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST"}
"""MLflow's words for a value that it does not take, and for a run that is in the trash."""


class InTrash(Exception):
    """The run or its experiment was deleted, and may be restored: until then nothing can be sent."""


class Server:
    """The calls whose refusals have to be told apart. What it raises is about the run or the server: nothing that was
    to be sent is passed over then."""

    def __init__(self, client: Any, job_key: str, refuse: Callable[[str, Exception], None]) -> None:
        """`refuse` is told of each single value that the server does not take."""
        self.client = client
        self.refuse = refuse
        self._job_key = job_key

    def knows(self, run_id: str) -> bool:
        """Whether there is such a run, in the trash or not. Raises MlflowException where the server does not say."""
        from mlflow.exceptions import MlflowException

        try:
            self.client.get_run(run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return False
        return True

    def is_ours(self, run_id: str) -> bool:
        """Whether the run is of this job. Raises InTrash, and MlflowException where there is none."""
        run = self._check_active(run_id)
        return run.data.tags.get(KEY_TAG, self._job_key) == self._job_key

    def experiment_of(self, run_id: str) -> str:
        """The id of the experiment that the run is in, where somebody may have moved it."""
        return self.client.get_run(run_id).info.experiment_id

    def run_with_key(self, experiment_id: str, key: str) -> str | None:
        """The run that has this key; None if there is none. Raises InTrash."""
        from mlflow.entities import ViewType

        found = self.client.search_runs([experiment_id], f"tags.`{KEY_TAG}` = '{key}'", run_view_type=ViewType.ALL)
        active = [run.info.run_id for run in found if run.info.lifecycle_stage == "active"]
        if found and not active:
            raise _run_in_trash(found[0].info.run_id)
        return active[0] if active else None

    def run_for(self, experiment_id: str, key: str, name: str, tags: dict[str, str]) -> str:
        """The id of the run that has this key; made with these tags if there is none (the answer to its creation may
        get lost). Raises InTrash."""
        found = self.run_with_key(experiment_id, key)
        if found is not None:
            return found
        tags = {"mlflow.source.type": "LOCAL", **tags, KEY_TAG: key}
        return self.client.create_run(experiment_id, tags=tags, run_name=name).info.run_id

    def experiment(self, name: str, artifact_location: str | None) -> str:
        """The id of an experiment, which is made if there is none. Raises InTrash."""
        from mlflow.exceptions import MlflowException

        experiment = self.client.get_experiment_by_name(name)
        if experiment is None:
            # The tag opens the experiment in the interface's view for model training.
            tags = {"mlflow.experimentKind": "custom_model_development"}
            try:
                return self.client.create_experiment(name, artifact_location=artifact_location, tags=tags)
            except MlflowException:  # another run created it at the same moment
                experiment = self.client.get_experiment_by_name(name)
                if experiment is None:
                    raise
        if experiment.lifecycle_stage != "active":
            raise _experiment_in_trash(name)
        return experiment.experiment_id

    def log(self, run_id: str, **of_one_kind: list[Any]) -> None:
        """Send metrics, params or tags; those that are refused for what they are, are named and passed over."""
        from mlflow.exceptions import MlflowException

        ((kind, items),) = of_one_kind.items()
        if not items:
            return
        try:
            self.client.log_batch(run_id, **of_one_kind, synchronous=True)
        except MlflowException as error:
            if not self.blames_what_was_sent(error, run_id):
                raise
            if len(items) == 1:
                what = describe_point(items[0].key, items[0].step) if kind == "metrics" else f"{kind} {items[0].key}"
                self.refuse(what, error)
                return
            half = len(items) // 2
            self.log(run_id, **{kind: items[:half]})
            self.log(run_id, **{kind: items[half:]})

    def blames_what_was_sent(self, error: Exception, run_id: str) -> bool:
        """Whether it is what was sent that the server does not take. Raises InTrash, or what a call raises that cannot
        be wrong: then it is the run or the server."""
        if getattr(error, "error_code", "") not in _INVALID:
            return False
        run = self._check_active(run_id)
        self.client.set_tag(run_id, KEY_TAG, run.data.tags.get(KEY_TAG, self._job_key))
        return True

    def points(self, run_id: str, name: str) -> set[tuple[int, int]]:
        """(step, Unix milliseconds) of every point that the server has of a metric."""
        return {(point.step, point.timestamp) for point in self.client.get_metric_history(run_id, name)}

    def _check_active(self, run_id: str) -> Any:
        run = self.client.get_run(run_id)
        if run.info.lifecycle_stage != "active":
            experiment = self.client.get_experiment(run.info.experiment_id)
            if experiment.lifecycle_stage != "active":
                raise _experiment_in_trash(experiment.name)
            raise _run_in_trash(run_id)
        return run


def describe_point(name: str, step: int) -> str:
    """How a point is named where it was refused."""
    return f"{name} at step {step}"


def _run_in_trash(run_id: str) -> InTrash:
    return InTrash(f"the run {run_id} was deleted there: restore it and the rest is sent, or remove it for good")


def _experiment_in_trash(name: str) -> InTrash:
    return InTrash(f"the experiment {name!r} was deleted there: restore it, or set another tracking.experiment")
