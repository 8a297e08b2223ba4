"""The report in a real browser: every control does what it says, at three widths, light and dark."""

import asyncio
import math
from pathlib import Path

import pytest
from browser import Page, needs_browser, opened

from d2v_scale.plots.report import write_report
from d2v_scale.tracking import RunTracker, TrackingConfig

INK = """[...document.querySelectorAll('.panel')].map(panel => {
  const canvas = panel.querySelector('canvas');
  if (!canvas) return '';
  const pixels = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
  let sum = 0;
  for (let i = 0; i < pixels.length; i += 1) sum = (31 * sum + pixels[i]) % 1000000007;
  return String(sum);
})"""
"""What every chart shows, as a number."""

LINES = """[...document.querySelectorAll('.panel canvas')].map(canvas => {
  const pixels = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
  let blue = 0;
  for (let i = 0; i < pixels.length; i += 4) blue += pixels[i] === 47 && pixels[i + 1] === 126 && pixels[i + 2] === 216;
  return blue;
})"""
"""Pixels in the colour of the first run, of every chart."""


def make_run(run_dir: Path, rate: float) -> Path:
    tracker = RunTracker(run_dir, TrackingConfig(enabled=False), is_main=True)
    tracker.start({}, {})
    tracker.log(0, 0, {"knn_accuracy": 0.4})
    for step in range(1, 200):
        loss = math.exp(-rate * step) + 0.05 * math.sin(step)
        norm = math.inf if step == 50 else 1 + rate * step
        tracker.log(step, 8 * step, {"loss": loss, "grad_norm": norm, "grad_norm/stem": norm / 2})
    tracker.log(199, 8 * 199, {"knn_accuracy": 0.5 + rate})
    return run_dir


async def changed(page: Page, action: str) -> list[int]:
    """Numbers of the charts that look different after some JavaScript."""
    await page.value("new Promise(done => setTimeout(done, 200))")
    before = await page.value(INK)
    await page.value(f"{action}; new Promise(done => setTimeout(done, 200))")
    after = await page.value(INK)
    return [i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b]


def control(name: str, value: str, event: str) -> str:
    element = f"document.getElementById('{name}')"
    return f"{element}.value = '{value}'; {element}.dispatchEvent(new Event('{event}'))"


async def click_through(address: str) -> None:
    async with opened(address) as page:
        assert await page.until("document.documentElement.dataset.drawn === 'yes'")
        charts = await page.value("document.querySelectorAll('.panel').length")
        assert charts == 3  # loss, k-NN, gradient norm
        everything = list(range(charts))
        assert min(await page.value(LINES)) > 15
        loss, knn, norm = everything
        assert loss in await changed(page, control("scale", "log", "change"))
        await changed(page, control("scale", "auto", "change"))
        assert await changed(page, "document.querySelector('.panel figcaption button').click()") == [loss]
        assert await changed(page, control("smoothing", "0.9", "input")) == [loss, norm]
        assert await changed(page, control("axis", "samples", "change")) == everything
        assert await changed(page, "document.querySelector('input[data-run=\"1\"]').click()") == everything
        assert await changed(page, "document.querySelectorAll('.names button')[1].click()") == [norm]
        background = await page.value("getComputedStyle(document.body).backgroundColor")
        assert await changed(page, "document.getElementById('theme').click()") == everything
        assert await page.value("getComputedStyle(document.body).backgroundColor") != background
        await hover_and_zoom(page, knn)
        for width in (400, 900, 1500):
            await page.ask(
                "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False
            )
            await asyncio.sleep(0.5)
            assert await page.value("document.documentElement.scrollWidth <= innerWidth"), width
            assert await page.value(
                "[...document.querySelectorAll('.uplot')].every(c => c.clientWidth <= c.parentElement.clientWidth)"
            )


async def hover_and_zoom(page: Page, knn: int) -> None:
    """The pointer shows values; a drag zooms all charts, `whole range` goes back."""
    await page.value("document.querySelector('.u-over').scrollIntoView({block: 'center'})")
    box = await page.value(
        "(r => [r.x, r.y, r.width, r.height])(document.querySelector('.u-over').getBoundingClientRect())"
    )
    x, y = box[0] + box[2] / 4, box[1] + box[3] / 2

    async def mouse(kind: str, at: float, buttons: int = 0) -> None:
        await page.ask("Input.dispatchMouseEvent", type=kind, x=at, y=y, button="left", buttons=buttons, clickCount=1)

    await mouse("mouseMoved", x)
    assert "slow-learner: 0." in (await page.until("document.querySelector('.tip').textContent", "a") or "")
    assert not await page.value("document.querySelector('.tip').hidden")
    before = await page.value(INK)
    await mouse("mousePressed", x, 1)
    for share in (0.3, 0.5, 0.6):
        await mouse("mouseMoved", box[0] + box[2] * share, 1)
    await mouse("mouseReleased", box[0] + box[2] * 0.6)
    await asyncio.sleep(0.5)
    zoomed = await page.value(INK)
    assert [a == b for a, b in zip(before, zoomed, strict=True)] == [False] * len(before), knn
    await page.value("document.getElementById('whole').click()")
    await asyncio.sleep(0.3)
    assert (await page.value(INK))[0] != zoomed[0]


@pytest.mark.slow
@needs_browser
def test_a_report_is_clicked_through(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "slow-learner", 0.01), make_run(tmp_path / "fast-learner", 0.05)]
    path = write_report(runs, tmp_path / "report.html")
    asyncio.run(click_through(path.as_uri()))
