import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from d2v_scale.plots.curves import plot_health
from d2v_scale.plots.report import _panels, write_report
from d2v_scale.tracking import RunTracker, TrackingConfig
from d2v_scale.tracking.summary import RunSummary, recipe_differences

ROOT = Path(__file__).resolve().parents[2]


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
    """What a page loads from elsewhere, and whether its tags close."""

    def __init__(self) -> None:
        super().__init__()
        self.outside: list[str] = []
        self.tables = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tables += tag == "table"
        self.outside += [
            f"{tag} {v}"
            for k, v in attrs
            if k in ("src", "href", "xlink:href") and v and not v.startswith(("data:", "#"))
        ]
        assert tag not in ("script", "link", "iframe")


def test_a_comparison_is_one_page_without_outside_links(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a", 1e-3), make_run(tmp_path / "b", 2e-3)]
    plot_health(runs[0])
    page = write_report(runs, tmp_path / "out" / "report.html").read_text()
    links = Links()
    links.feed(page)
    assert links.outside == []
    assert links.tables == 4
    assert page.count("<svg") == 3
    assert "optim.lr" in page
    assert "abc&lt;1&gt;" in page
    assert "data:image/png;base64," in page
    identifiers = re.findall(r'\bid="([^"]+)"', page)
    assert len(identifiers) == len(set(identifiers))
    assert set(re.findall(r'xlink:href="#([^"]+)"', page)) | set(re.findall(r"url\(#([^)]+)\)", page)) <= set(
        identifiers
    )


def test_every_name_of_a_panel_has_a_line_style_of_its_own(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a", 1e-3), make_run(tmp_path / "b", 2e-3)]
    summary = RunSummary.load(runs[0])
    parts = [f"grad_norm/{part}" for part in ("stem", "blocks_first", "blocks_middle", "blocks_last", "predictor")]
    for record in summary.records:
        record |= dict.fromkeys(parts, 1.0)
    panel = _panels([summary], ["#112233"], "step", "step")
    styles = {style for style in re.findall(r'style="([^"]*)"', panel) if "#112233" in style and "fill: none" in style}
    assert len(styles) == 1 + len(parts)  # the total's is solid


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
    assert "in progress" in write_report([tmp_path / "a"], tmp_path / "report.html").read_text()


def test_a_directory_without_a_run_is_named(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools" / "report.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert str(tmp_path) in done.stderr
