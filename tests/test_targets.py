"""Other runtimes against PyTorch: models from the project's exporters, on photographs, one image at a time.

    python -m pytest tests/test_targets.py -s

prints the table of docs/deployment.md. A runtime that is not installed is skipped.
"""
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable, Dict, NamedTuple

import numpy as np
import pytest
import timm
import torch
from browser import find_npm_package
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from timm.utils import reparameterize_model

from timm_mobileformer.cli import formats

pytest.importorskip('onnxruntime')
pytest.importorskip('sklearn', reason='scikit-learn brings photographs')

MODELS = 'test_mobileformer', 'mobilenetv3_small_100'  # the second to compare with, only printed
SIZE = 96


class Exported(NamedTuple):
    model: torch.nn.Module  # reparameterized
    images: torch.Tensor  # (B, 3, SIZE, SIZE)
    logits: np.ndarray  # (B, classes), by PyTorch
    folder: Path  # with model.onnx, and what a runtime converts it to


@torch.no_grad()
def export(name: str, folder: Path) -> Exported:
    """Random weights, with the BatchNorm statistics of the photographs, so that all activations have a usual range."""
    from sklearn.datasets import load_sample_images

    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10)
    transform = create_transform(**resolve_model_data_config(model, {'img_size': SIZE}))
    photos = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    images = torch.stack([transform(photo.crop((left, 50, left + 300, 350)))
                          for photo in photos for left in range(0, 340, 20)])
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) / 10)
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.momentum = None
    for batch in images.split(17) * 2:
        model.train()(batch)
    model, images = reparameterize_model(model.eval()), images[::8]
    formats.to_onnx(model, images, folder / 'model.onnx')
    return Exported(model, images, model(images).numpy(), folder)


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    return {name: export(name, tmp_path_factory.mktemp(name)) for name in MODELS}


@pytest.fixture(scope='module')
def table():
    """Relative differences by target and model, printed at the end."""
    rows: Dict[str, Dict[str, float]] = {}
    yield rows
    print(f'\n\n| | {" | ".join(f"`{name}`" for name in MODELS)} |\n|---|---:|---:|')
    for target, row in rows.items():
        print(f'| {target} | {" | ".join(f"{row[name]:.0e}" for name in MODELS)} |')


# Each target takes what was exported and returns what maps one image (1, 3, SIZE, SIZE) to logits.

Run = Callable[[np.ndarray], Any]


def onnxruntime(given: Exported) -> Run:
    session = formats.open_onnx(given.folder / 'model.onnx', 1)
    return lambda image: session.run(None, {'images': image})[0]


def openvino(given: Exported) -> Run:
    core = pytest.importorskip('openvino').Core()
    model = core.compile_model(given.folder / 'model.onnx', 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})
    return lambda image: model(image)[0]


def opencv(given: Exported) -> Run:
    net = pytest.importorskip('cv2').dnn.readNetFromONNX(str(given.folder / 'model.onnx'))

    def run(image: np.ndarray) -> np.ndarray:
        net.setInput(image)
        return net.forward()
    return run


def tract(given: Exported) -> Run:
    model = pytest.importorskip('tract').onnx().load(given.folder / 'model.onnx')
    runnable = model.into_model().into_runnable()
    return lambda image: runnable.run([image])[0].to_numpy()


def mnn(given: Exported) -> Run:
    pytest.importorskip('MNN')
    from MNN import expr, nn

    file = given.folder / 'model.mnn'
    convert = 'import _tools, sys; _tools.mnnconvert(sys.argv)'  # mnnconvert itself would also report to a server
    subprocess.run([sys.executable, '-c', convert, '-f', 'ONNX', '--modelFile', given.folder / 'model.onnx',
                    '--MNNModel', file], check=True, stdout=subprocess.DEVNULL)
    net = nn.load_module_from_file(str(file), ['images'], ['logits'])

    def run(image: np.ndarray) -> np.ndarray:
        logits, = net.forward([expr.const(image, list(image.shape), expr.NCHW)])
        return logits.read().copy()  # from memory that belongs to `logits`
    return run


def ncnn(given: Exported, by_default: bool = False) -> Run:
    ncnn, pnnx = pytest.importorskip('ncnn'), pytest.importorskip('pnnx')
    convert = [pnnx.EXEC_PATH, 'model.onnx', f'inputshape=[1,3,{SIZE},{SIZE}]']
    net = ncnn.Net()
    net.opt.num_threads = 1
    if not by_default:
        convert.append('fp16=0')
        net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = False
    subprocess.run(convert, cwd=given.folder, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert net.load_param(str(given.folder / 'model.ncnn.param')) == 0
    assert net.load_model(str(given.folder / 'model.ncnn.bin')) == 0

    def run(image: np.ndarray) -> np.ndarray:
        extractor = net.create_extractor()
        extractor.input('in0', ncnn.Mat(image[0]).clone())
        return extractor.extract('out0')[1]
    return run


def ncnn_by_default(given: Exported) -> Run:
    return ncnn(given, by_default=True)


def litert(given: Exported, quantize: bool = False) -> Run:
    litert_torch = pytest.importorskip('litert_torch')
    from ai_edge_litert.interpreter import Interpreter

    file = given.folder / 'model.tflite'
    if not file.exists():
        litert_torch.convert(given.model, (given.images[:1],)).export(str(file))
    if quantize:
        from ai_edge_quantizer.qtyping import TFLOperationName
        from ai_edge_quantizer.quantizer import Quantizer

        quantizer = Quantizer(str(file))
        for operation in TFLOperationName.CONV_2D, TFLOperationName.FULLY_CONNECTED:
            quantizer.add_dynamic_config('.*', operation, num_bits=8)
        file = given.folder / 'int8.tflite'
        quantizer.quantize().export_model(str(file), overwrite=True)
    run = Interpreter(str(file), num_threads=1).get_signature_runner()
    return lambda image: next(iter(run(args_0=image).values()))


def litert_int8(given: Exported) -> Run:
    return litert(given, quantize=True)


def node(given: Exported) -> Run:
    package = find_npm_package() or pytest.skip('npm install onnxruntime-web@1.30.0 brings the runtime')
    script = '''
        const ort = require('onnxruntime-web'), fs = require('fs');
        ort.env.wasm.numThreads = 1;
        (async () => {
            const session = await ort.InferenceSession.create(fs.readFileSync('model.onnx'));
            const [shape, pixels] = JSON.parse(fs.readFileSync(0));
            const {logits} = await session.run({images: new ort.Tensor('float32', pixels, shape)});
            console.log(JSON.stringify([...logits.data]));
        })();'''

    def run(image: np.ndarray) -> np.ndarray:
        done = subprocess.run(
            ['node', '-e', script], input=json.dumps([image.shape, image.ravel().tolist()]), cwd=given.folder,
            env={'NODE_PATH': str(package.resolve().parent)}, check=True, capture_output=True, text=True)
        return np.array(json.loads(done.stdout))
    return run


TARGETS = {  # the largest difference of a logit that is allowed, over the largest logit
    'ONNX Runtime': (onnxruntime, 1e-4),
    'OpenVINO, f32': (openvino, 1e-4),
    'OpenCV': (opencv, 1e-4),
    'tract': (tract, 1e-4),
    'MNN': (mnn, 1e-3),
    'onnxruntime-web in Node, WebAssembly': (node, 1e-4),
    'ncnn, float32': (ncnn, 1e-4),
    'ncnn, by default': (ncnn_by_default, 1e-2),
    'LiteRT': (litert, 1e-4),
    'LiteRT, dynamic int8': (litert_int8, 0.2),
}


@pytest.mark.parametrize('target', TARGETS)
def test_a_runtime_agrees_with_pytorch(target, exported, table):
    open_model, tolerance = TARGETS[target]
    row = {}
    for name, given in exported.items():
        run = open_model(given)
        answers = np.stack([np.asarray(run(image[None].numpy())).reshape(-1) for image in given.images])
        row[name] = np.abs(answers - given.logits).max() / np.abs(given.logits).max()
    table[target] = row
    assert row['test_mobileformer'] < tolerance
