"""From a fine-tuned model to files that run on devices, each checked against PyTorch on the held-out images.

The exporters are the libraries' own. What they are given is the reparameterized model, and what they write takes
normalized images (B, C, H, W) as the model does.
"""
import argparse
import math
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Tuple

import torch
import torch.nn as nn
from timm.data import create_loader, resolve_model_data_config
from timm.utils import accuracy, reparameterize_model

from timm_mobileformer import versions

from .data import Data, Pictures, check_images, open_data
from .digits import folder_or_digits
from .files import whole
from .load import load_model
from .terminal import InputError, progress, some

__all__ = ['run']

Run = Callable[[torch.Tensor], torch.Tensor]
NUM_CALIBRATION = 256  # images


# Each exporter takes the reparameterized model, at least two images and the file to write; each loader takes the file
# and the number of threads, and returns what maps images to logits.

def to_onnx(model: nn.Module, images: torch.Tensor, path: Path) -> None:
    import onnx

    if versions.is_older(torch.__version__, '2.8'):
        raise InputError(f'ONNX needs torch 2.8 or later, not {torch.__version__}, whose exporter fixes the batch size')
    torch.onnx.export(
        model, (images[:2],), path, input_names=['images'], output_names=['logits'], dynamo=True, optimize=True,
        external_data=False, verbose=False, dynamic_shapes=({0: torch.export.Dim('batch', max=2**31)},))
    graph = onnx.load(path)
    for node in graph.graph.node:
        del node.metadata_props[:]  # stack traces, as large as a small model and full of this machine's paths
    onnx.save(graph, path)


def to_int8(model: nn.Module, images: torch.Tensor, path: Path) -> None:
    """1x1 convolutions and linear layers, nearly all of the weights, in int8 by channel; the images calibrate the rest.

    Stay in float: products of two activations, softmax, LayerNorm, GELU, the arithmetic of dynamic ReLU; the stem and
    the depthwise convolutions, which hold no weights worth counting and in int8 cost accuracy. Where a depthwise
    convolution widens, int8 is also many times slower: ONNX Runtime has no fast kernel for it.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Images(CalibrationDataReader):
        batches = iter(images.split(8))

        def get_next(self):
            batch = next(self.batches, None)
            return None if batch is None else {'images': batch.numpy()}

    def in_int8(node) -> bool:
        if node.op_type == 'Conv' and (node.input[0] == 'images' or shapes[node.input[1]][1] == 1):
            return False  # the stem, depthwise
        return node.op_type in ('Conv', 'Gemm', 'MatMul') and node.input[1] in shapes

    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder, 'prepared.onnx')
        to_onnx(model, images, prepared)
        quant_pre_process(prepared, prepared, skip_symbolic_shape=True)
        graph = onnx.load(prepared).graph
        shapes = {t.name: t.dims for t in graph.initializer}
        quantize_static(
            prepared, path, Images(), quant_format=QuantFormat.QDQ, per_channel=True,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
            nodes_to_quantize=[node.name for node in graph.node if in_int8(node)])
    shrink(path)


def shrink(path: Path) -> None:
    """Shorten names, share equal tensors, drop zero points of 0 and shapes: a tenth of a small model in int8."""
    import onnx
    from onnx import TensorProto, numpy_helper

    model = onnx.load(path)
    graph = model.graph
    biases = {tensor.name for tensor in graph.initializer if tensor.data_type == TensorProto.INT32}
    for node in graph.node:
        if node.op_type == 'DequantizeLinear' and node.input[0] in biases:
            del node.input[2]  # 0 by definition, and optional
    used = {name for node in graph.node for name in node.input}
    names = {value.name: value.name for value in [*graph.input, *graph.output]} | {'': ''}
    shared: Dict[Any, str] = {}
    tensors: Dict[str, TensorProto] = {}
    for tensor in graph.initializer:
        if tensor.name in used:
            content = (tensor.data_type, *tensor.dims, numpy_helper.to_array(tensor).tobytes())
            names[tensor.name] = shared.setdefault(content, f'w{len(shared)}')
            tensor.name = names[tensor.name]
            tensors[tensor.name] = tensor
    del graph.initializer[:], graph.value_info[:]
    graph.initializer.extend(tensors.values())
    for node in graph.node:
        node.name = ''
        node.input[:] = [names[name] for name in node.input]
        node.output[:] = [names.setdefault(name, f'{len(names)}') for name in node.output]
    onnx.save(model, path)


def load_onnx(path: Path, threads: int) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])
    return lambda images: torch.from_numpy(session.run(None, {'images': images.numpy()})[0])


def to_program(model: nn.Module, images: torch.Tensor) -> torch.export.ExportedProgram:
    return torch.export.export(model, (images[:2],), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))


def to_openvino(model: nn.Module, images: torch.Tensor, path: Path) -> None:
    import openvino

    openvino.save_model(openvino.convert_model(to_program(model, images)), path, compress_to_fp16=False)


def load_openvino(path: Path, threads: int) -> Run:
    import openvino

    core = openvino.Core()
    model = core.read_model(path)
    shape = model.input().partial_shape
    shape[0] = 1  # a batch left open costs more than half of the speed, in shapes computed anew for every image
    model.reshape(shape)
    compiled = core.compile_model(
        model, 'CPU', {'INFERENCE_NUM_THREADS': threads, 'INFERENCE_PRECISION_HINT': 'f32'})
    return lambda images: torch.cat([torch.from_numpy(compiled(image.numpy())[0].copy()) for image in images.split(1)])


def to_executorch(model: nn.Module, images: torch.Tensor, path: Path) -> None:
    """One image at a time: XNNPACK would leave out slices, and more, of a dynamic batch."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.backends.xnnpack.utils.configs import get_transform_passes, get_xnnpack_edge_compile_config
    from executorch.exir import to_edge_transform_and_lower

    program = to_edge_transform_and_lower(
        torch.export.export(model, (images[:1],)),
        transform_passes=get_transform_passes(),
        partitioner=[XnnpackPartitioner()],
        compile_config=get_xnnpack_edge_compile_config(),
    ).to_executorch()
    path.write_bytes(program.buffer)


def load_executorch(path: Path, threads: int) -> Run:
    from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool
    from executorch.runtime import Runtime

    _unsafe_reset_threadpool(threads)  # safe before anything is loaded
    method = Runtime.get().load_program(path).load_method('forward')
    return lambda images: torch.cat([method.execute([image])[0].clone() for image in images.split(1)])


def to_aoti(model: nn.Module, images: torch.Tensor, path: Path) -> None:
    torch._inductor.aoti_compile_and_package(
        to_program(model, images), package_path=str(path), inductor_configs={'freezing': True})


def load_aoti(path: Path, threads: int) -> Run:
    return torch._inductor.aoti_load_package(str(path))  # its threads are those of when it was compiled


class Format(NamedTuple):
    title: str
    suffix: str
    export: Callable[[nn.Module, torch.Tensor, Path], None]
    load: Callable[[Path, int], Run]


FORMATS = {
    'onnx': Format('ONNX Runtime', '.onnx', to_onnx, load_onnx),
    'int8': Format('ONNX Runtime, int8', '.int8.onnx', to_int8, load_onnx),
    'openvino': Format('OpenVINO', '.xml', to_openvino, load_openvino),
    'executorch': Format('ExecuTorch, XNNPACK', '.pte', to_executorch, load_executorch),
    'aoti': Format('AOTInductor', '.pt2', to_aoti, load_aoti),
}


def load_trained(args: argparse.Namespace, classes: List[str]) -> Any:
    """The model to export, which must know these classes."""
    model = load_model(args).eval()
    known = list(model.pretrained_cfg.get('label_names') or ())
    if model.num_classes != len(classes) or known and known != classes:
        raise InputError(f'{args.checkpoint or args.model} has {model.num_classes:,} classes '
                         f'({some(known) or "without names"}), the data {len(classes):,} ({some(classes)}); '
                         'give the --data-dir that it was trained on')
    return model


@torch.inference_mode()
def run_all(run: Run, loader: Any, desc: str) -> torch.Tensor:
    """Logits (N, classes) of all images, in the order of the dataset."""
    return torch.cat([run(images) for images, _ in progress(loader, desc)])


@torch.inference_mode()
def latencies(runs: Dict[str, Run], image: torch.Tensor, rounds: int = 50) -> Dict[str, float]:
    """Median milliseconds for one image, taken in turns so that a busy machine hits all alike."""
    times: Dict[str, List[float]] = {name: [] for name in runs}
    for _ in progress(range(rounds), 'latency'):
        for name, run in runs.items():
            run(image)  # warm caches, which the runtime before has filled
            start = time.perf_counter()
            run(image)
            times[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(values) for name, values in times.items()}


def make_loaders(args: argparse.Namespace, data: Data, data_config: Dict[str, Any]) -> Tuple[Any, Any]:
    """Batches of the held-out images, and of some to train on, which calibrate."""
    some_to_train_on = Pictures(data.train.samples[::math.ceil(len(data.train) / NUM_CALIBRATION)])
    check_images([path for side in (some_to_train_on, data.held_out) for path, _ in side.samples], args.workers)
    held_out, calibration = (
        create_loader(
            dataset, batch_size=32, num_workers=args.workers,  # type: ignore[arg-type]
            device=torch.device('cpu'), **data_config)
        for dataset in (data.held_out, some_to_train_on))
    return held_out, calibration


def export(args: argparse.Namespace, data: Data) -> None:
    model = load_trained(args, data.classes)
    architecture = model.pretrained_cfg['architecture']
    torch.set_num_threads(args.threads)
    data_config = resolve_model_data_config(model, vars(args))
    loader, calibration_loader = make_loaders(args, data, data_config)
    images = torch.cat([images for images, _ in calibration_loader])
    targets = torch.cat([target for _, target in loader])
    reference = run_all(model, loader, 'PyTorch')
    wanted_top1 = accuracy(reference, targets)[0].item()
    tolerance = 1e-4 * max(1., reference.abs().max().item())
    plain = reparameterize_model(model).requires_grad_(False)

    runs: Dict[str, Run] = {'PyTorch, as trained': model, 'PyTorch, reparameterized': plain}
    rows = {title: ['', f'{sum(t.nbytes for t in net.state_dict().values()) / 1e6:.2f}', f'{wanted_top1:.2f}', '']
            for title, net in zip(runs, (model, plain), strict=True)}
    for name in progress(args.formats, 'export', unit='format'):
        form = FORMATS[name]
        with whole(args.output) as folder:
            path = folder / (architecture + form.suffix)
            form.export(plain, images, path)
            runs[form.title] = form.load(path, args.threads)
            logits = run_all(runs[form.title], loader, form.title)
            top1, difference = accuracy(logits, targets)[0].item(), (logits - reference).abs().max().item()
            if name == 'int8' and top1 < wanted_top1 - args.max_drop:
                raise InputError(f'int8 loses {wanted_top1 - top1:.2f} points of top-1, more than --max-drop')
            if name != 'int8' and not difference <= tolerance:
                raise InputError(f'{name} differs from PyTorch by {difference:.2g}, more than {tolerance:.2g}')
            size = sum(file.stat().st_size for file in folder.iterdir())  # OpenVINO writes two
            rows[form.title] = [path.name, f'{size / 1e6:.2f}', f'{top1:.2f}', f'{difference:.1g}']

    times = latencies(runs, images[:1])
    print(f'{architecture}, images of {" × ".join(map(str, data_config["input_size"]))}, normalized by mean '
          f'{data_config["mean"]} and std {data_config["std"]}; {len(targets):,} held out')
    print(f'files in {args.output}; latency of one image, {args.threads} thread{"s"[:args.threads > 1]}\n')
    print('| | file | MB | top-1, % | largest difference of a logit | latency, ms | speed, eager = 1 |')
    print('|---|---|---|---|---|---|---|')
    eager = times['PyTorch, as trained']
    for title, row in rows.items():
        print('|', ' | '.join([title, *row, f'{times[title]:.2f}', f'{eager / times[title]:.2f}']), '|')
    for problem in args.left_out:
        print(f'\nleft out: {problem}')


def run(args: argparse.Namespace) -> None:
    with folder_or_digits(args.data_dir or args.labels and args.labels.parent) as root:
        data = open_data(root, args.labels, args.val_split)
        for remark in data.remarks:
            print(remark)
        export(args, data)
