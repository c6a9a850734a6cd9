"""A page from a loopback web server in headless Chromium."""
import functools
import os
import shutil
import threading
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Iterator, Optional

import pytest

FLAGS = (
    'headless', 'no-sandbox', 'disable-gpu', 'disable-quic', 'no-first-run', 'disable-background-networking',
    'disable-component-update', 'disable-sync', 'disable-dev-shm-usage', 'use-fake-device-for-media-stream')


def find_npm_package() -> Optional[Path]:
    """The npm package onnxruntime-web, where ONNXRUNTIME_WEB or `npm install` in this folder puts it."""
    for place in os.environ.get('ONNXRUNTIME_WEB'), 'node_modules/onnxruntime-web':
        if place and Path(place, 'dist').is_dir():
            return Path(place)
    return None


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def serve(folder: Path) -> Iterator[str]:
    """The URL of a web server, as `python -m http.server` runs one."""
    server = ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f'http://127.0.0.1:{server.server_port}/'
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def open_browser(profile: Path, *flags: str):
    """A driver of Chromium with an empty profile; skips the test where there is none."""
    webdriver = pytest.importorskip('selenium.webdriver', reason='selenium drives Chromium')
    chromium, driver = shutil.which('chromium'), shutil.which('chromedriver')
    if not chromium or not driver:
        pytest.skip('no Chromium: apt-get install chromium chromium-driver')
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    options.set_capability('goog:loggingPrefs', {'browser': 'ALL'})
    for flag in (*FLAGS, f'user-data-dir={profile}', *flags):
        options.add_argument(f'--{flag}')
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        yield browser
    finally:
        browser.quit()
