"""`timm-mobileformer export web`: the page in a real browser, with onnxruntime-web from npm and without internet."""
import argparse
import json
import re
import threading
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from browser import HOLD, Quiet, complaint, find_npm_package, open_browser, serve, wait_for
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

from timm_mobileformer import attention_maps
from timm_mobileformer.cli import main
from timm_mobileformer.cli.images import read_image

pytest.importorskip('onnxruntime')
pytestmark = [
    pytest.mark.timeout(900),
    pytest.mark.skipif(not find_npm_package(), reason='npm install onnxruntime-web@1.30.0 brings the runtime')]


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    """Ten photographs as people have them: upside down by EXIF, transparent, gray, wide, tall, tiny, huge."""
    datasets = pytest.importorskip('sklearn.datasets', reason='scikit-learn brings photographs')
    folder = tmp_path_factory.mktemp('photos')
    temple, flower = map(Image.fromarray, datasets.load_sample_images().images)
    exif = Image.Exif()
    exif[0x0112] = 6
    temple.save(folder / 'on its side.jpg', exif=exif, quality=95)
    see_through = flower.convert('RGBA')
    see_through.putalpha(Image.linear_gradient('L').resize(flower.size))
    see_through.save(folder / 'transparent.png')
    flower.convert('L').save(folder / 'gray.png')
    temple.crop((0, 200, 640, 240)).save(folder / 'panorama.png')
    flower.crop((300, 0, 330, 427)).save(folder / 'tower.webp', lossless=True)
    flower.crop((300, 200, 307, 206)).save(folder / 'tiny.png')
    temple.resize((4000, 3000)).save(folder / '12 megapixels.jpg')
    flower.quantize(64).save(folder / 'palette.gif')
    temple.save(folder / 'temple.png')
    flower.save(folder / 'flower.jpg', quality=80)
    return sorted(folder.iterdir())


@pytest.fixture(scope='module')
def site(photos, tmp_path_factory):
    """The folder that the command wrote, and the model; it has 300 classes with long names."""
    folder = tmp_path_factory.mktemp('site')
    torch.manual_seed(0)
    model = timm.create_model('test_mobileformer', num_classes=300).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) / 10)
        model.classifier.weight.mul_(3)  # so that it is sure of something
    torch.save(dict(state_dict=model.state_dict(), args=argparse.Namespace(img_size=96)), folder / 'last.pth.tar')
    assert main(['export', 'web', '--model', 'test_mobileformer', '--checkpoint', str(folder / 'last.pth.tar'),
                 '--images', *map(str, photos), '--runtime', str(find_npm_package()), '--workers', '0',
                 '--output', str(folder / 'site')]) == 0
    about = json.loads((folder / 'site/model.onnx.json').read_text())
    about['label_names'] = [f'{i} and_a_very_long_name' + 3 * '_without_any_space' for i in range(300)]
    (folder / 'site/model.onnx.json').write_text(json.dumps(about))
    return folder / 'site', model


@pytest.fixture(scope='module')
def page(site, tmp_path_factory):
    """The loaded page, in a browser that reaches nothing but this server."""
    with serve(site[0]) as url, open_browser(
            tmp_path_factory.mktemp('profile'), 'host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1') as browser:
        browser.get(url)
        wait_for(browser, "!document.getElementById('controls').disabled")
        yield browser


def choose(browser, path):
    browser.find_element('css selector', '.button:not(.touch) input').send_keys(str(path))


def answer_to(browser, path):
    """What the page shows for an image: labels and probabilities."""
    choose(browser, path)
    label = path.name.replace("'", "\\'")
    wait_for(browser, f"document.getElementById('picture').getAttribute('aria-label') == '{label}'")
    return browser.execute_script(
        "return [...document.querySelectorAll('li')].map(li => [li.firstChild.textContent, +li.dataset.probability])")


def test_answers_are_those_of_pytorch(page, site, photos):
    transform = create_transform(**resolve_model_data_config(site[1], {'img_size': 96}))
    seen = set()
    for path in photos:
        answers = answer_to(page, path)
        with torch.inference_mode():
            wanted = site[1](transform(read_image(path))[None]).softmax(1)[0]
        assert len(answers) == 5 and answers == sorted(answers, key=lambda answer: -answer[1])
        for label, probability in answers:
            assert probability == pytest.approx(wanted[int(label.split()[0])].item(), abs=0.01), path.name
        first, second = wanted.topk(2).values
        if first - second > 0.02:
            assert int(answers[0][0].split()[0]) == wanted.argmax(), path.name
        seen.add(answers[0][0])
    assert len(seen) > 1
    errors = [entry for entry in page.get_log('browser') if entry['level'] == 'SEVERE']
    assert not errors


def test_attention_is_drawn_over_what_the_model_sees_and_can_be_switched_off(page, site, photos):
    path = next(path for path in photos if path.name == 'temple.png')
    answer_to(page, path)
    page.execute_script("document.getElementById('show').click()")
    assert not page.find_element('id', 'attention').is_displayed()
    page.execute_script("document.getElementById('show').click()")
    assert page.find_element('id', 'attention').is_displayed()
    drawn = np.array(page.execute_script(
        "const c = document.getElementById('attention'); return [...c.getContext('2d').getImageData(0, 0, c.width, "
        "c.height).data]")).reshape(-1, 800, 4)
    transform = create_transform(**resolve_model_data_config(site[1], {'img_size': 96}))
    with torch.no_grad():
        wanted = attention_maps(site[1], transform(read_image(path))[None])[-1].mobile_to_former.mean((0, 1, 2))
    height = drawn.shape[0]
    side = int(height * 0.875)
    top, left = (height - side) // 2, (800 - side) // 2
    n = wanted.shape[0]
    found = np.array([[drawn[top + int((i + .5) * side / n), left + int((j + .5) * side / n), 3] for j in range(n)]
                      for i in range(n)])
    np.testing.assert_allclose(found, 140 * wanted / wanted.max(), atol=8)
    assert tuple(drawn[0, 0, :3]) == (0, 0, 0) and drawn[0, 0, 3] > 100  # outside of the crop


def test_files_that_are_no_images_are_refused_in_a_sentence(page, photos, tmp_path):
    (tmp_path / 'broken.jpg').write_bytes(b'no picture')
    choose(page, tmp_path / 'broken.jpg')
    assert complaint(page) == 'broken.jpg is not an image that this browser can decode.'
    Image.new('RGB', (3000, 2)).save(tmp_path / 'hair.png')
    answer_to(page, photos[0])
    assert not page.find_element('id', 'error').is_displayed()
    choose(page, tmp_path / 'hair.png')
    assert complaint(page) == 'hair.png has 3000 × 2 pixels: its aspect ratio is too extreme to be resized.'


def permit(browser, setting):
    browser.execute_cdp_cmd('Browser.setPermission', dict(permission=dict(name='camera'), setting=setting))


def test_camera_is_looked_through_until_it_is_stopped_or_refused(page):
    camera = page.find_element('id', 'camera')
    permit(page, 'denied')
    camera.click()
    assert complaint(page) == 'Camera access was denied. Allow it for this page in the browser settings.'
    permit(page, 'granted')
    camera.click()
    wait_for(page, "document.getElementById('picture').getAttribute('aria-label') == 'Camera'")
    page.execute_script("document.getElementById('results').replaceChildren()")
    wait_for(page, "document.querySelectorAll('li').length == 5")  # again and again
    assert camera.get_attribute('aria-pressed') == 'true'
    camera.click()
    assert camera.get_attribute('aria-pressed') == 'false'


NO_IMAGE = 'broken.jpg is not an image that this browser can decode.'


@pytest.fixture
def held_page(page, tmp_path):
    """The page with `HOLD`, and a function that chooses a source and returns when it is held."""
    permit(page, 'granted')
    page.execute_script(HOLD)
    (tmp_path / 'broken.jpg').write_bytes(b'no picture')

    def start(source):
        held = page.execute_script('return held.length')
        if source == 'Camera':
            page.find_element('id', 'camera').click()
        else:
            choose(page, source if isinstance(source, Path) else tmp_path / source)
        wait_for(page, f'held.length == {held + 1}')

    yield page, start
    page.refresh()
    wait_for(page, "!document.getElementById('controls').disabled")


def is_on(page):
    """Whether a camera is on; checks that the page says so."""
    pressed, *streams = page.execute_script(
        "return [document.getElementById('camera').ariaPressed == 'true', ...streams.map(stream => stream.active)]")
    assert streams.count(True) == pressed
    return pressed


@pytest.mark.parametrize('first, second', [
    (first, second) for first in ('flower.jpg', 'broken.jpg', 'Camera')
    for second in ('temple.png', 'broken.jpg', 'Camera') if first != 'Camera' or second != 'Camera'])
def test_last_choice_is_shown_whichever_is_ready_first(held_page, photos, first, second):
    page, start = held_page
    named = {path.name: path for path in photos}
    for source in first, second:
        start(named.get(source, source))
    for last in 1, 0:
        page.execute_script(f'held[{last}]()')
        wait_for(page, 'shown.length')
    assert is_on(page) == (second == 'Camera')
    start(named['gray.png'])  # images are classified in turn: whatever was shown wrongly comes before it
    page.execute_script('held[2]()')
    wait_for(page, "shown.at(-1) == 'gray.png'")
    assert page.execute_script('return shown') == [NO_IMAGE if second == 'broken.jpg' else second, 'gray.png']
    assert not is_on(page)


def test_image_that_is_outdated_when_its_answer_comes_is_not_shown(held_page, photos):
    page, start = held_page
    page.execute_script('''
        const read = CanvasRenderingContext2D.prototype.getImageData, none = {clipboardData: {files: []}};
        window.reads = 0;
        CanvasRenderingContext2D.prototype.getImageData = function (...args) {  // called just before the inference
          reads++;
          document.onpaste(none);
          return read.apply(this, args);
        };
        window.look = () => picture.toDataURL() + document.getElementById('results').textContent;
        window.before = look();''')
    for i in range(2):  # images are classified in turn: when the second is read, the first could have been shown
        start(photos[i])
        page.execute_script(f'held[{i}]()')
        wait_for(page, f'reads == {i + 1}')
    assert page.execute_script('return look() == before')
    assert page.execute_script('return shown') == ['This is not an image. Drop or paste an image file.']


@pytest.mark.parametrize('clicks', [2, 3])
def test_camera_is_on_after_an_odd_number_of_clicks(held_page, clicks):
    """During the browser's permission prompt; a browser without a prompt would be too fast for it."""
    page, start = held_page
    for _ in range(clicks):
        page.find_element('id', 'camera').click()
    wait_for(page, f'held.length == {(clicks + 1) // 2}')
    page.execute_script('held.forEach(resolve => resolve())')
    assert is_on(page) == clicks % 2
    if clicks % 2:
        wait_for(page, "shown.at(-1) == 'Camera'")


@pytest.mark.parametrize('failing', ['HTMLMediaElement.prototype.play', 'CanvasRenderingContext2D.prototype.drawImage',
                                     'stream ended'])
def test_camera_that_cannot_be_shown_is_switched_off(held_page, failing):
    page, start = held_page
    start('Camera')
    if failing == 'stream ended':
        page.execute_script('held[0]()')
        wait_for(page, "shown.at(-1) == 'Camera'")
        page.execute_script('streams[0].getTracks()[0].stop()')
        wait_for(page, "document.getElementById('camera').ariaPressed == 'false'")
    else:
        page.execute_script(f"{failing} = () => {{ throw new Error('It failed.'); }}; held[0]()")
        assert complaint(page) == 'It failed.'
    assert not is_on(page)


def test_page_fits_into_every_window(page, photos, tmp_path):
    answer_to(page, photos[1])
    for scheme in 'light', 'dark':
        for width, height in (320, 640), (360, 740), (1280, 800):
            page.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', dict(
                width=width, height=height, deviceScaleFactor=1, mobile=False))
            page.execute_cdp_cmd('Emulation.setEmulatedMedia', dict(
                features=[dict(name='prefers-color-scheme', value=scheme)]))
            assert page.execute_script(
                'return document.documentElement.scrollWidth <= document.documentElement.clientWidth')
            page.save_screenshot(str(tmp_path / f'{scheme}{width}.png'))
            corner = Image.open(tmp_path / f'{scheme}{width}.png').convert('L').getpixel((2, 2))
            assert corner > 200 if scheme == 'light' else corner < 60


def test_runtime_that_is_not_the_pinned_one_is_not_run(page, site):
    class Tampered(Quiet):
        def copyfile(self, source, output):
            content = source.read()
            output.write(content[:-1] + bytes([content[-1] ^ self.path.endswith('.wasm')]))

    home = page.current_url
    with serve(site[0], Tampered) as url:
        page.get(url)
        assert 'ort-wasm-simd-threaded.wasm does not match the expected hash' in complaint(page)
    page.get(home)


def test_model_that_is_exported_again_is_loaded_although_the_cached_one_has_not_expired(page, site):
    about = {'architecture': 'test_mobileformer'}

    class Patient(Quiet):
        """Lets files be cached for an hour, as web servers do."""

        def end_headers(self):
            self.send_header('Cache-Control', 'max-age=3600')
            super().end_headers()

        def do_GET(self):
            if self.path == '/model.onnx.json':
                self.send_response(200)
                self.end_headers()
                self.wfile.write(json.dumps(about).encode())
            else:
                super().do_GET()

    home = page.current_url
    with serve(site[0], Patient) as url:
        for names in ['cat', 'dog'], ['cat', 'dog', 'horse']:
            about['label_names'] = names
            page.get(url)
            wait_for(page, f"document.getElementById('status').textContent.endsWith('is ready: {len(names)} classes.')")
    page.get(home)


def test_lost_connection_is_one_sentence_and_ends_the_other_downloads(page, site):
    started, ended = threading.Event(), threading.Event()

    class Unreliable(Quiet):
        """Sends half of the model, and the runtime for as long as someone receives it."""

        def do_GET(self):
            if self.path == '/model.onnx':
                started.wait(60)
                self.send_response(200)
                self.send_header('Content-Length', '1000')
                self.end_headers()
                self.wfile.write(bytes(500))
            elif self.path.endswith('.wasm'):
                self.send_response(200)
                self.end_headers()
                started.set()
                with suppress(ConnectionError):
                    while not ended.wait(0.01):
                        self.wfile.write(bytes(10000))
                ended.set()
            else:
                super().do_GET()

    home = page.current_url
    with serve(site[0], Unreliable) as url:
        try:
            page.get(url)
            assert re.fullmatch(r'model.onnx could not be loaded \(.+\). Check the connection and reload the page.',
                                complaint(page))
            assert ended.wait(60)
        finally:
            ended.set()
            page.get(home)


def test_javascript_lines_in_the_docs_classify_as_pytorch_does(page, site, photos):
    docs = Path(__file__).parents[1] / 'timm_mobileformer/docs/deployment.md'
    code, = (block for block in re.findall(r'```javascript\n(.*?)```', docs.read_text(), re.DOTALL)
             if 'onnxruntime-web' in block)
    path = next(path for path in photos if path.name == 'flower.jpg')
    (site[0] / path.name).write_bytes(path.read_bytes())
    (site[0] / 'lines.html').write_text(
        '<script type="importmap">{"imports": {"onnxruntime-web": "./ort.wasm.bundle.min.mjs"}}</script>'
        f'<script type="module">const file = await (await fetch("{path.name}")).blob();\n{code}\n'
        'window.answer = [...probabilities.data];</script>')
    page.get(page.current_url.rsplit('/', 1)[0] + '/lines.html')
    answer = torch.tensor(wait_for(page, 'window.answer'))
    transform = create_transform(**resolve_model_data_config(site[1], {'img_size': 96}))
    with torch.inference_mode():
        wanted = site[1](transform(read_image(path))[None]).softmax(1)[0]
    torch.testing.assert_close(answer, wanted, atol=0.01, rtol=0)


def test_folder_without_the_runtime_is_refused_with_the_way_to_get_it(tmp_path, capsys):
    (tmp_path / 'last.pth').touch()
    assert main(['export', 'web', '--runtime', str(tmp_path), '--model', 'test_mobileformer', '--checkpoint',
                 str(tmp_path / 'last.pth'), '--output', str(tmp_path / 'site')]) == 2
    error = capsys.readouterr().err
    assert 'does not contain ort.wasm.bundle.min.mjs and ort-wasm-simd-threaded.wasm' in error
    assert 'npm install onnxruntime-web@1.30.0' in error and not (tmp_path / 'site').exists()
