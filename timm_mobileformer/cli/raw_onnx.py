"""Preprocessing as part of an ONNX graph, so that its input is a decoded image."""
import math
from pathlib import Path
from typing import Any, Dict

import numpy as np

from .console import InputError

__all__ = ['add_preprocessing', 'check_preprocessing']

# Attributes of Resize for uint8 in NCHW. The results differ from Pillow's by at most 1 of 255 (2 on upscaled noise)
# where Pillow resizes the rows first, and by more where it resizes the columns first (Pillow 13 does for tall images).
RESIZE = {
    'bilinear': 'mode = "linear"',
    'bicubic': 'mode = "cubic", cubic_coeff_a = -0.5',
}
# Size (height, width) that an image is resized to, rounded as in timm's transforms for each crop_mode.
SHORT_SIDE = '''
    short_side = ReduceMin<keepdims = 0>(shape)
    longer = Mul(shape, scale)
    size = Div(longer, short_side)'''
KEEP_RATIO = '''
    sides = Cast<to = 11>(shape)
    scales = Cast<to = 11>(scale)
    ratios = Div(sides, scales)
    ratio = {reduce}<keepdims = 0>(ratios)
    exact_size = Div(sides, ratio)
    rounded_size = Round(exact_size)
    size = Cast<to = 7>(rounded_size)'''
SQUASH = '''
    size = Identity(scale)'''
# The excess over the input size is cropped from both ends; a negative excess is padded.
PREPROCESSING = '''
preprocessing (uint8[height, width, 3] image) => (float[1, 3, {height}, {width}] images, float[4] crop) {{
    shape = Shape<start = 0, end = 2>(image){size}
    planes = Transpose<perm = [2, 0, 1]>(image)
    zero = Constant<value_ints = [0]>()
    batch = Unsqueeze(planes, zero)
    resized = Resize<{resize}, antialias = 1, exclude_outside = 1, axes = [2, 3]>(batch, , , size)

    excess = Sub(size, target)
    two = Constant<value_int = 2>()
    padded_first = Div(excess, two)
    float_excess = Cast<to = 1>(excess)
    float_two = Constant<value_float = 2.0>()
    half = Div(float_excess, float_two)
    rounded_half = Round(half)
    cropped_first = Cast<to = 7>(rounded_half)
    is_padded = Less(excess, zero)
    first = Where(is_padded, padded_first, cropped_first)
    pad_first = Neg(first)
    pad_last = Sub(first, excess)
    pads = Concat<axis = 0>(pad_first, pad_last)

    pixels = Cast<to = 1>(resized)
    above_fill = Sub(pixels, fill)
    scaled = Mul(above_fill, factor)
    axes = Constant<value_ints = [2, 3]>()
    padded = Pad(scaled, pads, , axes)
    images = Add(padded, offset)

    last = Add(first, target)
    corners = Concat<axis = 0>(first, last)
    float_corners = Cast<to = 1>(corners)
    sizes = Concat<axis = 0>(size, size)
    float_sizes = Cast<to = 1>(sizes)
    crop = Div(float_corners, float_sizes)
}}'''
POSTPROCESSING = '''
postprocessing (float[1, {classes}] logits) => (float[{classes}] probabilities) {{
    row = Softmax<axis = 1>(logits)
    zero = Constant<value_ints = [0]>()
    probabilities = Squeeze(row, zero)
}}'''


def check_preprocessing(data_config: Dict[str, Any]) -> None:
    """Raise an InputError if this preprocessing is not supported in ONNX."""
    if data_config['interpolation'] not in RESIZE:
        raise InputError(f'--raw resizes by {" or ".join(RESIZE)} interpolation; this model has '
                         f'{data_config["interpolation"]}')
    if data_config['input_size'][0] != 3:
        raise InputError('--raw supports RGB images only; this model takes grayscale')


def add_preprocessing(path: Path, data_config: Dict[str, Any], with_crop: bool = False) -> None:
    """Add preprocessing and softmax to an ONNX file.

    The input `images` (B, 3, H, W) becomes `image` (height, width, 3), RGB in uint8, of any size; the output `logits`
    (B, classes) becomes `probabilities` (classes). Other outputs are unchanged.

    Args:
        path: ONNX file with opset 18 or later, modified in place.
        data_config: Preprocessing, from `model_data_config`.
        with_crop: Add an output `crop` (4): top, left, bottom and right of the center crop, as fractions of the image
            height and width.

    Raises:
        InputError: This preprocessing is not supported in ONNX.
    """
    import onnx
    from onnx import numpy_helper, parser

    check_preprocessing(data_config)
    net = onnx.load(path)
    target = np.array(data_config['input_size'][1:])
    scale = np.array([math.floor(side / data_config['crop_pct']) for side in target])
    mean, std = (np.array(data_config[key]).reshape(1, 3, 1, 1) for key in ('mean', 'std'))
    mode = data_config['crop_mode']
    size = (SQUASH if mode == 'squash' else KEEP_RATIO.format(reduce='ReduceMax') if mode == 'border'
            else SHORT_SIDE if scale[0] == scale[1] else KEEP_RATIO.format(reduce='ReduceMin'))
    fill = np.rint(255 * mean) if mode == 'border' else np.zeros_like(mean)  # padding value, from 0 to 255
    constants = dict(scale=scale, target=target, fill=fill.astype(np.float32),
                     factor=(1 / (255 * std)).astype(np.float32), offset=((fill / 255 - mean) / std).astype(np.float32))

    def model_of(text: str) -> Any:
        return onnx.helper.make_model(
            parser.parse_graph(text), opset_imports=net.opset_import, ir_version=net.ir_version)

    before = model_of(PREPROCESSING.format(
        height=target[0], width=target[1], size=size, resize=RESIZE[data_config['interpolation']]))
    before.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())
    classes = net.graph.output[0].type.tensor_type.shape.dim[1].dim_value
    after = model_of(POSTPROCESSING.format(classes=classes))
    for model in before, after:
        onnx.compose.add_prefix(model, f'{model.graph.name}/', rename_inputs=False, rename_outputs=False, inplace=True)
    others = [*(output.name for output in net.graph.output[1:]), *['crop'] * with_crop]
    raw = onnx.compose.merge_models(before, net, [('images', 'images')], outputs=['logits', *others])
    raw = onnx.compose.merge_models(raw, after, [('logits', 'logits')], outputs=['probabilities', *others])
    raw.graph.output.sort(key=lambda output: ['probabilities', *others].index(output.name))
    del raw.graph.value_info[:]  # shapes with a dynamic batch size
    onnx.checker.check_model(raw)
    onnx.save(raw, path)
