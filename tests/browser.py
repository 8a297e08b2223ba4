"""A real browser without a window, for tests that look at pages: opens, evaluates, takes pictures."""

import asyncio
import base64
import json
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from mlflow_server import free_port

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome on this machine")


class Page:
    """What a browser shows."""

    def __init__(self, socket: Any) -> None:
        self._socket = socket

    async def ask(self, method: str, **params: Any) -> dict[str, Any]:
        """One command of the browser's debugging protocol; its result."""
        await self._socket.send_json({"id": 1, "method": method, "params": params})
        while True:
            reply = json.loads((await self._socket.receive()).data)
            if reply.get("id") == 1:
                assert "error" not in reply, reply
                return reply["result"]

    async def value(self, expression: str) -> Any:
        """Of JavaScript. Raises AssertionError where it throws."""
        found = await self.ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    async def until(self, expression: str, wanted: Any = True) -> Any:
        """Wait until JavaScript is at least `wanted`, a minute at most; the last value."""
        value = None
        for _ in range(120):
            found = await self.ask("Runtime.evaluate", expression=expression, returnByValue=True)
            value = found["result"].get("value")
            if value is not None and value >= wanted:
                break
            await asyncio.sleep(0.5)
        return value

    async def picture(self, path: Path, whole: bool = False) -> Path:
        """A screenshot, of the `whole` page or of what is seen."""
        shot = await self.ask("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))
        return path


@asynccontextmanager
async def opened(url: str, width: int = 1500, height: int = 1000) -> AsyncIterator[Page]:
    """A page in a browser of its own, which is closed in the end."""
    aiohttp = pytest.importorskip("aiohttp")
    port = free_port()
    profile = tempfile.mkdtemp()
    command = [str(BROWSER), "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
    command += [f"--remote-debugging-port={port}", f"--window-size={width},{height}", "about:blank"]
    browser = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        async with aiohttp.ClientSession() as session:
            pages: list[dict[str, Any]] = []
            for _ in range(600):
                try:
                    async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
                        pages = [page for page in await answer.json(content_type=None) if page["type"] == "page"]
                    if pages:
                        break
                except aiohttp.ClientError:
                    pass
                await asyncio.sleep(0.1)
            async with session.ws_connect(pages[0]["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                page = Page(socket)
                await page.ask("Page.navigate", url=url)
                yield page
    finally:
        browser.terminate()
        browser.wait()
        shutil.rmtree(profile, ignore_errors=True)
