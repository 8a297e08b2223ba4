"""The MLflow comparison page of two runs, in a real browser."""

import asyncio
import math
from pathlib import Path

import pytest
from browser import needs_browser, opened
from mlflow import MlflowClient
from mlflow_server import MlflowServer

from d2v_scale.tracking import RunTracker, TrackingConfig
from d2v_scale.tracking.follow import catch_up

COLOURS = "new Set([...plot.querySelectorAll('path.js-line')].map(line => line.style.stroke)).size"
CHARTS_WITH_TWO_CURVES = f"[...document.querySelectorAll('.js-plotly-plot')].filter(plot => {COLOURS} === 2).length"


async def look(url: str, expression: str, wanted: int, picture: Path) -> tuple[int, str]:
    """Open `url`, wait until `expression` is at least `wanted`; its value and the page's text. Takes a picture."""
    async with opened(url) as page:
        value = await page.until(expression, wanted)
        text = await page.value("document.body.innerText")
        await page.picture(picture)
        return value, text


@pytest.mark.slow
@needs_browser
def test_both_runs_are_drawn_on_the_comparison_page(
    tmp_path: Path, mlflow_server: MlflowServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server.uri)
    for name, lr in (("slow-learner", 1e-4), ("fast-learner", 1e-3)):
        tracker = RunTracker(tmp_path / name, TrackingConfig(enabled=False, experiment="compared"), is_main=True)
        tracker.start({"optim": {"lr": lr}}, {})
        for step in range(1, 60):
            tracker.log(step, 8 * step, {"loss": math.exp(-300 * lr * step / 60), "knn_accuracy": step / 100})
        tracker.finish("done")
        assert catch_up(tmp_path / name) is not None
    client = MlflowClient(mlflow_server.uri)
    experiment = client.get_experiment_by_name("compared")
    assert experiment is not None
    assert len(client.search_runs([experiment.experiment_id])) == 2
    page = f"/#/experiments/{experiment.experiment_id}/runs?compareRunsMode=CHART&workflowType=machine_learning"
    picture = tmp_path / "comparison.png"
    charts, text = asyncio.run(look(mlflow_server.uri + page, CHARTS_WITH_TWO_CURVES, 3, picture))
    assert charts >= 3  # loss, k-NN accuracy, hours; those below are drawn when scrolled to
    assert "slow-learner" in text
    assert "fast-learner" in text
