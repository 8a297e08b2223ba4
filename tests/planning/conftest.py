"""Jobs that were measured: bytes held by every rank, and bytes given to collectives in one step."""

import json
from pathlib import Path
from typing import Any

import pytest
from launch import run_ranks
from plan_jobs import CASES

WORKER = Path(__file__).resolve().parents[1] / "distributed/plan_worker.py"


@pytest.fixture(scope="session")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, str], dict[str, Any]]:
    """By world size and name: the case and what its ranks held and sent."""
    folder = tmp_path_factory.mktemp("plans")
    found = {}
    for world_size, cases in CASES.items():
        given, answer = folder / f"cases{world_size}.json", folder / f"measured{world_size}.json"
        given.write_text(json.dumps(cases))
        run_ranks(world_size, WORKER, str(given), str(answer), timeout=600)
        found |= {(world_size, one["case"]["name"]): one for one in json.loads(answer.read_text())}
    return found
