"""The page in a real Chromium: no request, no console message, light and dark."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from helpers.records import HOSTILE, matrix, write_run
from PIL import Image

from pm_hf.reports.page import write_report

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars"),
    "--host-resolver-rules=MAP * ~NOTFOUND",  # the browser itself reaches nobody either
    *("--window-size=1280,3000", "--enable-logging=stderr", "--v=0"),
)
OWN = re.compile(r"https?://([\w-]+\.)*(google|googleapis|gstatic)\.com/")  # what Chromium asks for by itself
THEMES = {"light": 1, "dark": 0}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM.is_file(), reason=f"needs {CHROMIUM}, the Debian package chromium"),
]


def shoot(page, folder, theme="light"):
    """(picture as (height, width, 3), console messages, requested addresses) of a page."""
    folder.mkdir()
    picture, log = folder / f"{theme}.png", folder / "net.json"
    places = [f"--user-data-dir={folder / 'profile'}", f"--screenshot={picture}", f"--log-net-log={log}"]
    command = [CHROMIUM, *FLAGS, *places, f"--blink-settings=preferredColorScheme={THEMES[theme]}", page.as_uri()]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120, check=True)
    messages = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    events = json.loads(log.read_text())["events"]
    asked = {str(event.get("params", {}).get("url", "")) for event in events}
    pages = {url for url in asked if url.startswith("http") and not OWN.match(url)}
    shutil.rmtree(folder / "profile", ignore_errors=True)
    return np.asarray(Image.open(picture).convert("RGB")), messages, pages


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Three runs with unfriendly names on one page."""
    folder, tasks = tmp_path_factory.mktemp("runs"), ["news", HOSTILE, "long name " * 30, *map(str, range(30))]
    runs = [
        write_run(folder / "pm", tasks, seed=1),
        write_run(folder / "joint", tasks, "joint", joint=True),
        write_run(folder / "average", tasks, "average", R=matrix(len(tasks), 9)),
    ]
    return write_report(runs, folder / "out")[0]


def test_messages_and_requests_would_be_seen(tmp_path):
    page = tmp_path / "bad.html"
    page.write_text('<script>console.error("seen")</script><img src="http://127.0.0.1:9/x.png">')
    _, messages, asked = shoot(page, tmp_path / "out")
    assert any("seen" in message for message in messages)
    assert asked == {"http://127.0.0.1:9/x.png"}


@pytest.mark.parametrize("theme", THEMES)
def test_the_page_asks_for_nothing_and_says_nothing(report, theme, tmp_path):
    picture, messages, asked = shoot(report, tmp_path / "out", theme)
    assert messages == []
    assert asked == set()
    brightness = np.median(picture)
    assert brightness > 240 if theme == "light" else brightness < 40
    ink = np.abs(picture.astype(int) - picture[0, 0].astype(int)).max(axis=-1) > 60
    assert 0.02 < ink.mean() < 0.5  # something is drawn, in either theme


@pytest.mark.parametrize("width", [500, 1280, 1920])  # 500 is the narrowest window that a headless Chromium opens
def test_the_page_does_not_grow_wider_than_the_window(width, report, tmp_path):
    folder = tmp_path / "profile"
    script = "<script>document.title = [document.documentElement.scrollWidth, innerWidth].join(' ')</script>"
    text = report.read_text(encoding="utf-8").replace("default-src 'none'", "script-src 'unsafe-inline'")
    (tmp_path / "measured.html").write_text(text.replace("</body>", script + "</body>"), encoding="utf-8")
    size = f"--window-size={width},3000"
    command = [CHROMIUM, *FLAGS, size, f"--user-data-dir={folder}", "--dump-dom", (tmp_path / "measured.html").as_uri()]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120, check=True)
    needed, window = map(int, done.stdout.split("<title>")[1].split("</title>")[0].split())
    assert needed <= window <= width
