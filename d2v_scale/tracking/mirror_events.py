"""What lines of mlflow_events.jsonl do to an MLflow run: params, tags, description, data, end, evaluations of it."""

import json
from typing import Any

from d2v_scale.tracking.mirror_lines import mlflow_name
from d2v_scale.tracking.mirror_server import InTrash, Server

END_OF_RUN = {"done": "FINISHED", "requeue": "SCHEDULED", "failed": "FAILED"}
DESCRIPTION = "mlflow.note.content"
_END = "<!-- What follows is not d2v_scale's -->"
"""Of our part of a description; what a person adds stays."""


def apply(event: dict[str, Any], run_id: str, job_key: str, server: Server) -> None:
    """Do what an event says, but for artifacts. Raises MlflowException."""
    from mlflow.entities import RunTag

    match event["event"]:
        case "begin":
            server.client.update_run(run_id, status="RUNNING")
        case "params":
            _params(event["values"], run_id, server)
        case "tags":
            server.log(run_id, tags=[RunTag(mlflow_name(key), value[:5000]) for key, value in event["values"].items()])
        case "description":
            server.log(run_id, tags=[RunTag(DESCRIPTION, _described(event["text"], run_id, server))])
        case "inputs":
            _inputs(event["datasets"], run_id, server)
        case "evaluation":
            _evaluation(event, run_id, job_key, server)
        case "status":
            said = [RunTag(name, event[name][:5000]) for name in ("outcome", "verdict") if event.get(name)]
            server.log(run_id, tags=said)
            server.client.set_terminated(run_id, END_OF_RUN[event["status"]], end_time=int(event["time"] * 1000))


def _described(text: str, run_id: str, server: Server) -> str:
    """Our text before what a person wrote into the description."""
    there = server.client.get_run(run_id).data.tags.get(DESCRIPTION, "")
    added = there.partition(_END)[2] if _END in there else f"\n\n{there}" if there else ""
    return f"{text}\n\n{_END}{added}"


def _inputs(datasets: list[dict[str, str]], run_id: str, server: Server) -> None:
    """Data sets with a digest each; the same one a second time adds nothing."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    given = []
    for one in datasets:
        source = json.dumps({"uri": one["source"]})
        profile = json.dumps({"said": one["said"]})
        dataset = Dataset(one["name"][:500], one["digest"][:36], "uri", source, profile=profile)
        given.append(DatasetInput(dataset, [InputTag("mlflow.data.context", one["context"])]))
    server.client.log_inputs(run_id, given)


def _evaluation(event: dict[str, Any], run_id: str, job_key: str, server: Server) -> None:
    """A nested run with the metrics of one evaluation."""
    from mlflow.entities import Metric, Param

    when = int(event["time"] * 1000)
    key = f"{job_key}/{event['name']}/{when}"
    experiment_id = server.client.get_run(run_id).info.experiment_id
    try:
        child = server.run_for(experiment_id, key, event["name"], {"mlflow.parentRunId": run_id})
    except InTrash as error:  # somebody does not want this evaluation: the run's other records wait for nothing
        server.refuse(f"evaluation {event['name']} at step {event['step']}", error)
        return
    metrics = [Metric(mlflow_name(name), value, when, event["step"]) for name, value in event["values"].items()]
    params = [Param(mlflow_name(name), value[:6000]) for name, value in event["params"].items()]
    server.log(child, metrics=metrics)
    server.log(child, params=params)
    server.client.set_terminated(child, "FINISHED", end_time=when)


def _params(values: dict[str, str], run_id: str, server: Server) -> None:
    """MLflow's params cannot change: what a resume changed is told by a tag `changed.<name>`."""
    from mlflow.entities import Param, RunTag

    wanted = {mlflow_name(key): value[:6000] for key, value in values.items()}
    there = server.client.get_run(run_id).data.params
    new = [Param(key, value) for key, value in wanted.items() if key not in there]
    changed = [
        RunTag(f"changed.{key}", f"{there[key]} -> {value}"[:5000])
        for key, value in wanted.items()
        if there.get(key, value) != value
    ]
    for start in range(0, len(new), 100):
        server.log(run_id, params=new[start : start + 100])
    server.log(run_id, tags=changed)
