import hashlib
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from d2v_scale.plots.curve_data import curve_data, thinned
from d2v_scale.plots.report import UPLOT, write_report
from d2v_scale.plots.results import results
from d2v_scale.tracking import RunTracker, TrackingConfig
from d2v_scale.tracking.summary import RunSummary, recipe_differences
from d2v_scale.tracking.timeline import add

ROOT = Path(__file__).resolve().parents[2]
PLOTS = ROOT / "d2v_scale" / "plots"


def make_run(run_dir: Path, lr: float) -> Path:
    for resume, last in ((None, 20), (10, 30)):
        tracker = RunTracker(run_dir, TrackingConfig(enabled=False), is_main=True)
        tracker.start({}, {"git.revision": "abc<1>"}, resume_step=resume)
        for step in range((resume or 0) + 1, last + 1):
            skipped = float(step > 25)
            tracker.log(
                step, 8 * step, {"loss": lr / step, "grad_norm": math.inf if step == 5 else 1.0, "skipped": skipped}
            )
        tracker.log(last, 8 * last, {"knn_accuracy": last / 100})
        tracker.finish("requeue")  # which draws nothing
    (run_dir / "recipe.yaml").write_text(f"optim:\n  lr: {lr}\nseed: 1\n")
    status = {"outcome": "failed", "exit_code": 11, "reason": "too many skips", "step": 30, "time": 2e9}
    (run_dir / "status.json").write_text(json.dumps(status))
    return run_dir


class Links(HTMLParser):
    """What a page loads from elsewhere, its tables, its scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.outside: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.outside += [
            f"{tag} {v}"
            for k, v in attrs
            if k in ("src", "href", "xlink:href") and v and not v.startswith(("data:", "#"))
        ]
        assert tag not in ("link", "iframe")


def numbers_of(page: str) -> dict[str, Any]:
    """What the page's script draws."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page)
    assert found is not None
    return json.loads(found[1])


def test_a_comparison_is_one_page_without_outside_links(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a", 1e-3), make_run(tmp_path / "b", 2e-3)]
    page = write_report(runs, tmp_path / "out" / "report.html").read_text()
    links = Links()
    links.feed(page)
    assert links.outside == []
    assert links.tags.count("script") == 3
    assert "optim.lr" in page
    assert "abc&lt;1&gt;" in page
    assert "The MIT License" in page
    identifiers = re.findall(r'\bid="([^"]+)"', page)
    assert len(identifiers) == len(set(identifiers))
    read = set(re.findall(r'(?:getElementById|on)\("([a-z]+)"', (PLOTS / "browser" / "report.js").read_text()))
    assert read <= set(identifiers)


def test_verdict_result_and_differences_come_before_the_curves(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a", 1e-3), make_run(tmp_path / "b", 2e-3)]
    page = write_report(runs, tmp_path / "report.html").read_text()
    page = page[page.index("<body>") :]
    places = [
        page.index(word) for word in ('class="card"', "Result", "What differs", 'id="curves"', "Incidents", "Pictures")
    ]
    assert places == sorted(places)
    assert "Failed: Too many skips" in page
    parts = [part["title"] for part in numbers_of(page)["parts"]]
    assert parts == ["Loss", "Quality", "Health"]  # in the order of PARTS; of speed nothing is recorded


def test_a_report_says_where_the_time_went_by_attempt(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", 1e-3)
    for step in (11, 12):
        add(run, "at", step=step, spent={"data": 0.0})
    page = write_report([run], tmp_path / "report.html").read_text()
    spent = page[page.index("Where the time went") : page.index('id="curves"')]
    assert spent.count("<tr>") == 5  # a head, two attempts, both, and shares
    assert "start-up" in spent
    (run / "timeline.jsonl").unlink()
    assert "Where the time went" not in write_report([run], tmp_path / "report.html").read_text()


def test_lines_of_a_run_differ_in_style_and_runs_in_colour(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a", 1e-3), make_run(tmp_path / "b", 2e-3)]
    summaries = [RunSummary.load(run) for run in runs]
    parts = [f"grad_norm/{part}" for part in ("stem", "blocks_first", "blocks_middle", "blocks_last", "predictor")]
    for summary in summaries:
        for record in summary.records:
            record |= dict.fromkeys(parts, 1.0)
    [lines] = [panel["lines"] for panel in panels_of(curve_data(summaries)) if panel["title"] == "Gradient norm"]
    assert len({(line["colour"], line["style"]) for line in lines}) == len(lines) == 2 * (1 + len(parts))
    alone = next(panel["lines"] for panel in panels_of(curve_data(summaries[:1])) if panel["title"] == "Gradient norm")
    assert len({line["colour"] for line in alone}) == 1 + len(parts)


def panels_of(data: dict[str, Any]) -> list[dict[str, Any]]:
    return [panel for part in data["parts"] for row in part["rows"] for panel in row["panels"]]


def test_points_that_are_not_finite_are_marked(tmp_path: Path) -> None:
    data = curve_data([RunSummary.load(make_run(tmp_path / "a", 1e-3))])
    [line] = next(panel["lines"] for panel in panels_of(data) if panel["title"] == "Gradient norm")
    assert data["positions"][line["x"]["step"]][line["bad"][0]] == 5
    assert line["y"][line["bad"][0]] is None


def test_no_peak_is_lost_among_many_points() -> None:
    values = [float(i % 7) for i in range(100_000)]
    values[12_345], values[54_321], values[77_777] = 1e6, -1e6, math.nan
    kept = thinned(values, 500)
    assert len(kept) <= 520
    assert {0, 12_345, 54_321, 77_777, 99_999} <= set(kept)
    assert thinned(values[:400], 500) == list(range(400))


def test_modalities_stand_side_by_side(tmp_path: Path) -> None:
    tracker = RunTracker(tmp_path / "joint", TrackingConfig(enabled=False), is_main=True)
    tracker.start({}, {})
    sources = {"vision": 1.0, "pairs/text": 2.0}
    for step in range(1, 4):
        figures = {f"{name}/{source}": v for source, v in sources.items() for name in ("loss", "target_std")}
        tracker.log(step, step, {"loss": 1.5, "loss/masked_0_25": 1.0, "cka/vision/layer_01": 0.5, **figures})
    summary = RunSummary.load(tmp_path / "joint")
    titles = [[panel["title"] for panel in row["panels"]] for row in curve_data([summary])["parts"][0]["rows"]]
    assert titles == [["Loss", "Loss: vision", "Loss: pairs/text"]]
    labels = [line["label"] for panel in panels_of(curve_data([summary])) for line in panel["lines"]]
    assert labels == ["loss", "loss", "loss", "targets", "targets", "layer 1"]
    page = write_report([tmp_path / "joint"], tmp_path / "report.html").read_text()
    assert "<th>vision</th><th>pairs/text</th>" in page
    assert "<td>loss</td><td>1</td><td>2</td>" in page


def test_fine_tuning_and_baselines_stand_beside_the_result(tmp_path: Path) -> None:
    tracker = RunTracker(tmp_path / "a", TrackingConfig(enabled=False), is_main=True)
    tracker.start({}, {})
    tracker.log(0, 0, {"knn_accuracy": 0.4, "knn_chance": 0.1, "test/wer": 1.0})
    tracker.log(9, 9, {"knn_accuracy": 0.9, "knn_chance": 0.1, "test/wer": 0.25})
    tracker.log(10, 10, {"knn_accuracy": 0.75, "knn_chance": 0.1, "knn_raw": 0.5, "test/wer": 0.5})
    shown = results([RunSummary.load(tmp_path / "a")])
    rows = re.findall(r"<td>(.*?)</td><td>(.*?)</td>", shown)
    assert ("k-NN accuracy", "75.0 % <small>best 90.0 % at step 9</small>") in rows
    assert ("with random weights", "40.0 %") in rows
    assert ("with raw features", "50.0 %") in rows
    assert ("by chance (the commonest label)", "10.0 %") in rows
    assert ("fine-tuned: word error rate", "50.0 % <small>best 25.0 % at step 9</small>") in rows
    assert ("before fine-tuning", "100.0 %") in rows


def test_a_picture_is_shown_once_and_the_page_stays_small(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, 1e-3) for name in "ab"]
    noise = np.random.default_rng(0).integers(0, 256, (1500, 1500, 3), dtype=np.uint8)
    for number, run in enumerate(runs):
        (run / "plots").mkdir()
        Image.fromarray(noise[:100, :100]).save(run / "plots" / "first_batch.png")
        Image.fromarray(np.roll(noise, number, 0)).save(run / "plots" / "masks.png")  # 6.7 MB each
        Image.fromarray(noise[:50]).save(run / "plots" / "health.png")  # what the curves draw
    path = write_report(runs, tmp_path / "report.html")
    page = path.read_text()
    assert path.stat().st_size < 5e6
    assert page.count("<img ") == 3
    assert "a, b: the same picture" in page


def test_no_text_of_a_run_ends_the_script(tmp_path: Path) -> None:
    run = make_run(tmp_path / "x<!--<script>", 1e-3)
    (tmp_path / "y").mkdir()
    page = write_report([run, make_run(tmp_path / "y" / "b", 1e-3)], tmp_path / "report.html").read_text()
    assert numbers_of(page)["runs"][0]["name"] == "x<!--<script>"
    assert "x<!--" not in page


def test_uplot_is_whole_and_unchanged() -> None:
    """What is vendored is what its makers published; the sums are those of version 1.6.32."""
    sums = dict(reversed(line.split()) for line in (UPLOT / "sha256sums").read_text().splitlines())
    assert {path.name for path in UPLOT.iterdir()} == {*sums, "sha256sums"}
    assert {name: hashlib.sha256((UPLOT / name).read_bytes()).hexdigest() for name in sums} == sums
    assert sums["uPlot.iife.min.js"].startswith("19c8d4c6ad88929a")


def test_summary_finds_what_happened(tmp_path: Path) -> None:
    summary = RunSummary.load(make_run(tmp_path / "a", 1e-3))
    told = [incident.what for incident in summary.incidents]
    assert "grad_norm is inf" in told
    assert "restarted or resumed" in told
    assert "skipped is now 1" in told
    assert "10 recorded steps between 11 and 20 were done again" in told
    assert told[-1] == "failed: too many skips"
    assert summary.outcome == "failed: too many skips"
    assert (summary.first("loss"), summary.last("step"), summary.best("knn_accuracy")) == (1e-3, 30, 0.3)


def test_only_what_differs_is_told(tmp_path: Path) -> None:
    summaries = [RunSummary.load(make_run(tmp_path / name, lr)) for name, lr in (("a", 1e-3), ("b", 2e-3))]
    assert recipe_differences(summaries) == {"optim.lr": ["0.001", "0.002"]}


@pytest.mark.parametrize("records", [0, 1])
def test_a_run_that_has_hardly_begun_is_reported(tmp_path: Path, records: int) -> None:
    tracker = RunTracker(tmp_path / "a", TrackingConfig(enabled=False), is_main=True)
    tracker.start({}, {})
    for step in range(records):
        tracker.log(step + 1, 8, {"loss": 1.0})
    assert "In progress" in write_report([tmp_path / "a"], tmp_path / "report.html").read_text()


def test_a_directory_without_a_run_is_named(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools" / "report.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert str(tmp_path) in done.stderr


def test_no_run_is_best_where_a_stem_is_measured_on_other_shards(tmp_path: Path) -> None:
    """Only shards of all stems were compared."""
    summaries = [RunSummary.load(make_run(tmp_path / name, 1e-3)) for name in ("a", "b")]
    for number, summary in enumerate(summaries):
        summary.records[-1]["knn_accuracy"] = 0.5 + number / 10
        summary.recipe["evaluation.sets.vision.test"] = "same"
    assert "<b>" in results(summaries)
    summaries[0].recipe["evaluation.sets.vision.test"] = "other"
    assert "<b>" not in results(summaries)
