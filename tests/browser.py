"""A page from a loopback web server in headless Chromium."""
import functools
import os
import shutil
import threading
import time
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Iterator, Optional, Type

import pytest

FLAGS = (
    'headless', 'no-sandbox', 'disable-gpu', 'disable-quic', 'no-first-run', 'disable-background-networking',
    'disable-component-update', 'disable-sync', 'disable-dev-shm-usage', 'use-fake-device-for-media-stream')
# Makes the steps that a choice waits for finish when the test says so, and records what the page shows.
HOLD = """
window.shown = [];
window.streams = [];
window.held = [];
const hold = (object, name, keep) => {
  const original = object[name];
  object[name] = async function (...args) {
    const outcome = original.apply(this, args);
    await outcome.then(keep, () => {});
    await new Promise(resolve => held.push(resolve));
    return outcome;
  };
};
hold(HTMLImageElement.prototype, 'decode', () => {});
hold(navigator.mediaDevices, 'getUserMedia', stream => streams.push(stream));
const [picture, error] = ['picture', 'error'].map(id => document.getElementById(id));
new MutationObserver(changes => changes.forEach(({target}) => {
  if (target !== picture && (target !== error || error.hidden)) return;
  const text = target === picture ? picture.getAttribute('aria-label') : error.textContent;
  if (shown.at(-1) !== text) shown.push(text);
})).observe(document.body, {subtree: true, attributeFilter: ['aria-label', 'hidden']});
"""


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
def serve(folder: Path, handler: Type[Quiet] = Quiet) -> Iterator[str]:
    """The URL of a web server, as `python -m http.server` runs one."""
    server = ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(handler, directory=str(folder)))
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


def wait_for(browser, condition, seconds=120):
    end = time.monotonic() + seconds
    while not (found := browser.execute_script(f'return {condition}')):
        assert time.monotonic() < end, (condition, browser.find_element('tag name', 'body').text,
                                        browser.get_log('browser'))
        time.sleep(0.05)
    return found


def complaint(browser):
    return wait_for(browser, "!document.getElementById('error').hidden && document.getElementById('error').textContent")
