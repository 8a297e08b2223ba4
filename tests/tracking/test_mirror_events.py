"""What lines of mlflow_events.jsonl do to an MLflow run; the client is a recording of calls."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
from mlflow.entities import RunTag

from d2v_scale.tracking.mirror_events import DESCRIPTION, apply
from d2v_scale.tracking.mirror_server import Server


class Client:
    """A run's tags, inputs and end."""

    def __init__(self) -> None:
        self.tags: dict[str, str] = {}
        self.inputs: list[Any] = []
        self.ended = ""

    def get_run(self, _run_id: str) -> Any:
        return SimpleNamespace(data=SimpleNamespace(tags=self.tags, params={}))

    def log_batch(self, _run_id: str, *, synchronous: bool, tags: list[RunTag]) -> None:
        self.tags |= {tag.key: tag.value for tag in tags}

    def log_inputs(self, _run_id: str, datasets: list[Any]) -> None:
        self.inputs += datasets

    def set_terminated(self, _run_id: str, status: str, end_time: int) -> None:
        self.ended = status


@pytest.fixture
def client() -> Client:
    return Client()


def happens(client: Client, **event: Any) -> None:
    apply({"time": 1.0, **event}, "run", "job", Server(client, "job", lambda what, error: None))


def test_the_end_of_a_run_says_how_and_what_it_is_worth_looking_at(client: Client) -> None:
    """MLflow heard FINISHED of a run that was stopped at step 130 of 800."""
    said = "Stopped at step 130 of 800 (--stop_at)"
    happens(client, event="status", status="done", outcome=said, verdict="Healthy.")
    assert client.ended == "FINISHED"
    assert client.tags == {"outcome": said, "verdict": "Healthy."}


def test_the_end_of_a_run_of_an_earlier_version_is_only_its_status(client: Client) -> None:
    happens(client, event="status", status="failed")
    assert (client.ended, client.tags) == ("FAILED", {})


def test_what_a_person_wrote_into_the_description_stays(client: Client) -> None:
    client.tags[DESCRIPTION] = "for the paper"
    happens(client, event="description", text="Running.")
    client.tags[DESCRIPTION] += "\n\nsecond try"
    happens(client, event="description", text="Done.")
    text = client.tags[DESCRIPTION]
    assert text.startswith("Done.\n\n<!--")
    assert text.endswith("-->\n\nfor the paper\n\nsecond try")
    assert "Running." not in text


def test_data_are_listed_with_digest_place_and_context(client: Client) -> None:
    row = {"name": "photos", "digest": "00ff", "source": "a/*.tar", "said": "9 samples", "context": "training"}
    happens(client, event="inputs", datasets=[row])
    [given] = client.inputs
    assert (given.dataset.name, given.dataset.digest) == ("photos", "00ff")
    assert json.loads(given.dataset.source) == {"uri": "a/*.tar"}
    assert [(tag.key, tag.value) for tag in given.tags] == [("mlflow.data.context", "training")]
