"""The page at `/`: alone it needs nothing from outside, and in a browser it shows a user and moves with her events."""

from __future__ import annotations

import html
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import uvicorn
from starlette.testclient import TestClient

from lum_ray.config import Run
from lum_ray.data.state import State
from lum_ray.steps import publish, train
from serve.ingress import PAGE, create_app
from serve.live import Live, Loader, Local, Target
from tests.serve.fake_predictor import FakeGts, FakePredictor, local

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def test_the_page_asks_nobody_else() -> None:
    response = TestClient(create_app({"lumos": local(FakePredictor())})).get("/")
    assert response.headers["Content-Type"].startswith("text/html")
    policy = response.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "connect-src 'self'" in policy
    addresses = re.findall(r"(?:https?:)?//[\w.-]+\.\w+", response.text)
    assert set(addresses) <= {"http://www.w3.org"}  # the name of SVG's elements
    assert "innerHTML" not in response.text  # what comes from data is never read as markup
    assert "localStorage" not in response.text
    assert PAGE.stat().st_size < 64 << 10


@contextmanager
def serving(app: object) -> Iterator[str]:
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))  # type: ignore[arg-type]
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        deadline = time.monotonic() + 30
        while not server.started and time.monotonic() < deadline:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join(timeout=30)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_in_a_browser_predictions_and_attention_move_with_her_events(tiny: Run, tmp_path: Path) -> None:
    state = State.open(publish(tiny))
    live = Live(Loader("lumos", 64 << 20), Target(train(tiny), state.uri))
    with serving(create_app({"lumos": Local(live), "gts": local(FakeGts())})) as url:

        def dom(query: str) -> str:
            command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}",
                       "--virtual-time-budget=20000", "--dump-dom", f"{url}/?{query}"]  # fmt: skip
            return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout

        user = state.users()[0]
        planned, edited = dom(f"user={user}"), dom(f"user={user}&demo=2")
    for page in (planned, edited):
        assert 'data-ready="yes"' in page
        assert page.count('class="look"') == tiny.section.history_days
        assert "LUMOS: lumos_tiny" in page and "GTS-LUM: fake_gts" in page
        assert "item 0" in page
    pressed = [len(re.findall(r'class="event[^"]*"[^>]*aria-pressed="true"', page)) for page in (planned, edited)]
    assert pressed[1] == pressed[0] + 2
    assert planned.count('class="more"') == 0
    assert edited.count('class="more"') > 0
    weights = [re.findall(r'class="look"[^>]*scaleY\(([\d.e-]+)\)', page) for page in (planned, edited)]
    assert len(weights[0]) == tiny.section.history_days and weights[0] != weights[1]
    told = [html.unescape(re.search(r'id="look"[^>]*>([^<]*)<', page)[1]) for page in (planned, edited)]  # type: ignore[index]
    assert all("of its attention" in one for one in told)
