"""Raw ONNX files preprocess as timm does: every crop_mode and interpolation, on photographs of all shapes."""
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from timm_mobileformer.cli import raw_onnx
from timm_mobileformer.cli.console import InputError

onnx = pytest.importorskip('onnx')
onnxruntime = pytest.importorskip('onnxruntime')
datasets = pytest.importorskip('sklearn.datasets', reason='scikit-learn brings photographs')

CONFIG = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


@pytest.fixture(scope='module')
def photographs():
    temple, flower = datasets.load_sample_images().images
    gray = np.asarray(Image.fromarray(flower).convert('L').convert('RGB'))
    noise = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    return {'noise': noise, 'landscape': temple, 'portrait': temple[:, 100:300],
            'panorama': flower[200:260], 'tower': flower[:, 300:331], 'gray': gray[:223, :224],
            'model size': temple[:96, :96], 'tiny': flower[200:209, 300:307], 'pixel': flower[200:201, 300:301]}


def preprocess(tmp_path, **config):
    """A function from pixels to what the graph makes of them for the network: images (3, H, W), and the crop."""
    height, width = config['input_size'][1:]
    onnx.save(onnx.parser.parse_model(f'''
        <ir_version: 10, opset_import: ["": 20]>
        net (float[batch, 3, {height}, {width}] images) => (float[batch, 3] logits, float[batch, 3, h, w] seen) {{
            means = GlobalAveragePool(images)
            logits = Flatten(means)
            seen = Identity(images)
        }}'''), tmp_path / 'net.onnx')
    raw_onnx.add_preprocessing(tmp_path / 'net.onnx', config, with_crop=True)
    session = onnxruntime.InferenceSession(tmp_path / 'net.onnx', providers=['CPUExecutionProvider'])
    assert [(x.name, x.type, len(x.shape)) for x in session.get_inputs()] == [('image', 'tensor(uint8)', 3)]
    assert session.get_outputs()[0].name == 'probabilities' and session.get_outputs()[0].shape == [3]

    def run(pixels):
        probabilities, seen, crop = session.run(None, {'image': np.ascontiguousarray(pixels)})
        np.testing.assert_allclose(probabilities, torch.from_numpy(seen[0].mean((1, 2))).softmax(0), atol=1e-4)
        return seen[0], crop
    return run


@pytest.mark.parametrize('mode, interpolation, size, crop_pct', [
    ('center', 'bilinear', (224, 224), 0.875),
    ('center', 'bicubic', (96, 96), 0.9),
    ('center', 'bicubic', (160, 223), 0.95),  # resized by another rule than a square
    ('squash', 'bilinear', (97, 96), 1.0),
    ('border', 'bilinear', (96, 128), 0.95),
    ('border', 'bicubic', (97, 97), 1.0),
])
def test_preprocessing_is_that_of_timm(mode, interpolation, size, crop_pct, photographs, tmp_path):
    config = dict(CONFIG, input_size=(3, *size), crop_mode=mode, interpolation=interpolation, crop_pct=crop_pct)
    run, transform = preprocess(tmp_path, **config), create_transform(**config)
    for name, pixels in photographs.items():
        seen, (top, left, bottom, right) = run(pixels)
        wanted = transform(Image.fromarray(pixels)).numpy()
        assert seen.shape == wanted.shape, name
        difference = 255 * np.abs(seen - wanted) * np.reshape(config['std'], (3, 1, 1))
        # Pillow rounds to 0 ... 255 between its two passes, whose order depends on its version and the shape
        is_tall = pixels.shape[0] > pixels.shape[1]
        limit = 20 if interpolation == 'bicubic' and is_tall else 2 if name == 'noise' else 1
        assert difference.max() < limit + 0.1, name
        assert difference.mean() < (0.5 if interpolation == 'bicubic' else 0.2), name
        if mode == 'border':
            assert min(top, left) <= 0.05 and max(bottom, right) >= 0.95, name
        else:
            assert top + bottom == pytest.approx(1, abs=0.02) and left + right == pytest.approx(1, abs=0.02), name
            assert min(top, left) >= 0 and max(bottom, right) <= 1, name


def test_interpolation_that_onnx_lacks_is_refused_by_name():
    with pytest.raises(InputError, match=re.escape('--raw resizes by bilinear or bicubic interpolation; this model has '
                                                   'lanczos')):
        raw_onnx.add_preprocessing(Path('no.onnx'), dict(interpolation='lanczos'))
