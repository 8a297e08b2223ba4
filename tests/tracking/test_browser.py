"""The MLflow comparison page of two runs, in a real browser."""

import asyncio
import base64
import json
import math
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow_server import MlflowServer, free_port

from d2v_scale.tracking import RunTracker, TrackingConfig
from d2v_scale.tracking.follow import catch_up

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
COLOURS = "new Set([...plot.querySelectorAll('path.js-line')].map(line => line.style.stroke)).size"
CHARTS_WITH_TWO_CURVES = f"[...document.querySelectorAll('.js-plotly-plot')].filter(plot => {COLOURS} === 2).length"


async def look(url: str, expression: str, wanted: int, picture: Path) -> tuple[int, str]:
    """Open `url`, wait until `expression` is at least `wanted`; its value and the page's text. Takes a picture."""
    aiohttp = pytest.importorskip("aiohttp")
    port = free_port()
    profile = tempfile.mkdtemp()
    command = [str(BROWSER), "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
    command += [f"--remote-debugging-port={port}", "--window-size=1500,1000", "about:blank"]
    browser = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        async with aiohttp.ClientSession() as session:
            pages: list[dict[str, Any]] = []
            for _ in range(300):
                try:
                    async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
                        pages = [page for page in await answer.json(content_type=None) if page["type"] == "page"]
                    break
                except aiohttp.ClientError:
                    await asyncio.sleep(0.1)
            async with session.ws_connect(pages[0]["webSocketDebuggerUrl"], max_msg_size=0) as socket:

                async def ask(method: str, **params: Any) -> dict[str, Any]:
                    await socket.send_json({"id": 1, "method": method, "params": params})
                    while True:
                        reply = json.loads((await socket.receive()).data)
                        if reply.get("id") == 1:
                            return reply["result"]

                await ask("Page.navigate", url=url)
                value = 0
                for _ in range(120):
                    value = (await ask("Runtime.evaluate", expression=expression))["result"].get("value", 0)
                    if value >= wanted:
                        break
                    await asyncio.sleep(0.5)
                text = (await ask("Runtime.evaluate", expression="document.body.innerText"))["result"].get("value", "")
                picture.write_bytes(base64.b64decode((await ask("Page.captureScreenshot"))["data"]))
                return value, text
    finally:
        browser.terminate()
        browser.wait()
        shutil.rmtree(profile, ignore_errors=True)


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome on this machine")
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
