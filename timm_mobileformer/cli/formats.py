"""Export formats: exporters and loaders."""
import tempfile
from pathlib import Path
from typing import Any, Callable, Dict, NamedTuple, Optional, Tuple

import torch
import torch.nn as nn

from timm_mobileformer import MobileFormer, versions
from timm_mobileformer.attention import recording

from .console import InputError

__all__ = ['FORMATS', 'Run', 'load_raw', 'open_onnx']

Run = Callable[[Any], torch.Tensor]


class WithAttention(nn.Module):
    """A Mobile-Former that also returns the attention of its first token in the last bridge.

    Maps images (B, 3, H, W) to logits (B, classes) and the attention map (B, H / 32, W / 32), averaged over the heads.
    """

    def __init__(self, model: MobileFormer):
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        with recording(self.model) as maps:
            logits = self.model(images)
        return logits, maps[-1].mobile_to_former.mean(dim=(1, 2))


# Exporters take the reparameterized model, at least two preprocessed images and the output file. Loaders take the file
# and the number of threads, and return a function from inputs to outputs.

def to_program(model: nn.Module, images: torch.Tensor) -> torch.export.ExportedProgram:
    return torch.export.export(model, (images[:2],), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))


def to_onnx(model: nn.Module, images: torch.Tensor, path: Path, opset: Optional[int] = None) -> None:
    """Export to ONNX with the given opset version, by default that of PyTorch."""
    import onnx

    if versions.is_older(torch.__version__, '2.8'):
        raise InputError(f'ONNX needs torch 2.8 or later, not {torch.__version__}, whose exporter fixes the batch size')
    outputs = ['logits', 'attention'] if isinstance(model, WithAttention) else ['logits']
    torch.onnx.export(to_program(model, images), (), path, input_names=['images'], output_names=outputs,
                      dynamo=True, optimize=True, external_data=False, verbose=False, opset_version=opset)
    file = onnx.load(path)
    if opset not in (None, written := next(o.version for o in file.opset_import if not o.domain)):
        raise InputError(f'the exporter of torch {torch.__version__} cannot write opset {opset}; it wrote {written}')
    for node in file.graph.node:
        del node.metadata_props[:]  # stack traces: large, with local paths
    onnx.save(file, path)


def to_onnx_int8(model: nn.Module, images: torch.Tensor, path: Path, opset: Optional[int] = None) -> None:
    """Export to ONNX with linear layers and 1x1 convolutions in int8 per channel; the images calibrate the activations.

    Products of two activations, softmax, LayerNorm, GELU and dynamic ReLU remain in float, as do the stem and the
    depthwise convolutions, which have few weights and lose accuracy in int8. ONNX Runtime also has no fast int8 kernel
    for depthwise convolutions with a channel multiplier above 1.
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
        if node.op_type not in ('Conv', 'Gemm', 'MatMul') or node.input[1] not in shapes:
            return False
        return node.op_type != 'Conv' or node.name != stem and shapes[node.input[1]][1] != 1  # depthwise

    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder, 'prepared.onnx')
        to_onnx(model, images, prepared, opset)
        quant_pre_process(prepared, prepared, skip_symbolic_shape=True)
        graph = onnx.load(prepared).graph
        shapes = {t.name: t.dims for t in graph.initializer}
        stem = next((node.name for node in graph.node if node.op_type == 'Conv'), '')
        quantize_static(
            prepared, path, Images(), quant_format=QuantFormat.QDQ, per_channel=True,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
            nodes_to_quantize=[node.name for node in graph.node if in_int8(node)])
    shrink(path)


def shrink(path: Path) -> None:
    """Shorten names, deduplicate tensors, and remove zero points of 0 and shapes; saves 10 % of a small int8 model."""
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


def open_onnx(path: Path, threads: int = 0) -> Any:
    """Open an ONNX Runtime session; 0 threads means one per core."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])


def load_onnx(path: Path, threads: int) -> Run:
    session = open_onnx(path, threads)
    return lambda images: torch.from_numpy(session.run(None, {'images': images.numpy()})[0])


def load_raw(path: Path, threads: int) -> Run:
    """Load an ONNX file with preprocessing; the returned function takes a list of images (H, W, 3) in uint8."""
    session = open_onnx(path, threads)
    return lambda images: torch.stack(
        [torch.from_numpy(session.run(['probabilities'], {'image': image.numpy()})[0]) for image in images])


def to_web(model: nn.Module, images: torch.Tensor, path: Path) -> None:
    to_onnx(WithAttention(model) if isinstance(model, MobileFormer) else model, images, path)


def to_openvino(model: nn.Module, images: torch.Tensor, path: Path) -> None:
    import openvino

    openvino.save_model(openvino.convert_model(to_program(model, images)), path, compress_to_fp16=False)


def load_openvino(path: Path, threads: int) -> Run:
    import openvino

    core = openvino.Core()
    model = core.read_model(path)
    shape = model.input().partial_shape
    shape[0] = 1  # a dynamic batch size more than halves the speed
    model.reshape(shape)
    compiled = core.compile_model(
        model, 'CPU', {'INFERENCE_NUM_THREADS': threads, 'INFERENCE_PRECISION_HINT': 'f32'})
    return lambda images: torch.cat([torch.from_numpy(compiled(image.numpy())[0].copy()) for image in images.split(1)])


def lower(program: torch.export.ExportedProgram, path: Path) -> None:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.backends.xnnpack.utils.configs import get_transform_passes, get_xnnpack_edge_compile_config
    from executorch.exir import to_edge_transform_and_lower

    lowered = to_edge_transform_and_lower(
        program,
        transform_passes=get_transform_passes(),
        partitioner=[XnnpackPartitioner()],
        compile_config=get_xnnpack_edge_compile_config(),
    ).to_executorch()
    path.write_bytes(lowered.buffer)


def to_executorch(model: nn.Module, images: torch.Tensor, path: Path) -> None:
    """One image at a time: XNNPACK would leave out slices, and more, of a dynamic batch."""
    lower(torch.export.export(model, (images[:1],)), path)


def to_executorch_int8(model: nn.Module, images: torch.Tensor, path: Path) -> None:
    """Quantize with PT2E and the XNNPACK quantizer, int8 per channel, calibrated on the images."""
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=True))
    observed = prepare_pt2e(torch.export.export(model, (images[:1],)).module(), quantizer)
    for image in images.split(1):
        observed(image)
    lower(torch.export.export(convert_pt2e(observed), (images[:1],)), path)


def load_executorch(path: Path, threads: int) -> Run:
    from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool
    from executorch.runtime import Runtime

    _unsafe_reset_threadpool(threads)  # safe before a program is loaded
    method = Runtime.get().load_program(path).load_method('forward')
    return lambda images: torch.cat([method.execute([image])[0].clone() for image in images.split(1)])


def to_aoti(model: nn.Module, images: torch.Tensor, path: Path) -> None:
    torch._inductor.aoti_compile_and_package(
        to_program(model, images), package_path=str(path), inductor_configs={'freezing': True})


def load_aoti(path: Path, threads: int) -> Run:
    return torch._inductor.aoti_load_package(str(path))  # the number of threads is fixed at compile time


class Format(NamedTuple):
    title: str
    suffix: str
    export: Callable[..., None]
    load: Callable[[Path, int], Run]
    batch: Any = 'batch'  # batch size


FORMATS = {
    'onnx': Format('ONNX Runtime', '.onnx', to_onnx, load_onnx),
    'onnx-int8': Format('ONNX Runtime, int8', '.int8.onnx', to_onnx_int8, load_onnx),
    'web': Format('Web page', '.onnx', to_web, load_raw),
    'openvino': Format('OpenVINO', '.xml', to_openvino, load_openvino),
    'executorch': Format('ExecuTorch, XNNPACK', '.pte', to_executorch, load_executorch, 1),
    'executorch-int8': Format('ExecuTorch, XNNPACK, int8', '.int8.pte', to_executorch_int8, load_executorch, 1),
    'aoti': Format('AOTInductor', '.pt2', to_aoti, load_aoti),
}
