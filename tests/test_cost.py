"""What a Mobile-Former may cost at most, as counts that are the same on every machine, and what it must never do."""
import functools
from typing import Any, Callable, List, Tuple

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import freeze_batch_norm_2d
from timm.utils import reparameterize_model
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from timm_mobileformer import DynamicReLU
from timm_mobileformer.cli.cost import saved_for_backward
from timm_mobileformer.layers import DepthwiseConv2d

TINY = 'test_mobileformer'
# For one image of 224 x 224 in float32, what the authors' program costs: MB read and written by kernels, and MB kept
# for the backward pass.
AUTHORS = {
    '26m': (71.9, 21.3),
    '52m': (67.3, 21.3),
    '96m': (107.1, 35.0),
    '151m': (155.7, 48.8),
    '214m': (188.0, 59.1),
    '294m': (233.0, 74.6),
    '508m': (314.2, 103.3),
}


class Recorder(TorchDispatchMode):
    """The operators that run, with the tensors they read and return."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: List[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        read, written = ([t for t in tree_leaves(x) if isinstance(t, torch.Tensor)] for x in ((args, kwargs), out))
        self.calls.append((func, read, written))
        return out


def traffic(model: Callable[..., Any], x: torch.Tensor) -> int:
    """Bytes of the tensors that operators read and write, in one inference.

    An operator counts if it computes something: if its result is no view of what it was given, or if it writes into
    that. A linear layer, a convolution or an attention is one operator.
    """
    with torch.inference_mode(), Recorder() as recorder:
        model(x)
    moved = 0
    for func, read, written in recorder.calls:
        storages = {t.untyped_storage()._cdata for t in read}
        if func._schema.is_mutable or any(t.untyped_storage()._cdata not in storages for t in written):
            moved += sum(t.nbytes for t in read + written)
    return moved


def test_a_view_moves_nothing_and_what_copies_or_writes_in_place_does():
    x = torch.randn(4, 6)
    assert traffic(lambda x: x.t().unsqueeze(0).reshape(6, 4), x) == 0
    assert traffic(lambda x: x.t().reshape(24), x) == 2 * x.nbytes
    assert traffic(lambda x: F.relu(F.relu(x), inplace=True), x) == 4 * x.nbytes


@functools.cache
def cost(variant: str) -> Tuple[float, float]:
    """MB read and written after `reparameterize_model`, and MB kept for the backward pass of each image."""
    torch.manual_seed(0)
    images = torch.randn(4, 3, 224, 224)
    model = timm.create_model(f'mobileformer_{variant}')
    return traffic(reparameterize_model(model).eval(), images[:1]) / 1e6, saved_for_backward(model, images) / 1e6


@pytest.mark.parametrize('variant', AUTHORS)
def test_cost_is_a_fraction_of_the_authors(variant):
    (traffic, saved), (authors_traffic, authors_saved) = cost(variant), AUTHORS[variant]
    assert traffic <= 0.71 * authors_traffic
    assert saved <= 0.73 * authors_saved


def test_294m_costs_no_more_than_promised():
    traffic, saved = cost('294m')
    assert traffic <= 165
    assert saved <= 53


@pytest.mark.parametrize('fused', [False, True], ids=['as trained', 'fused'])
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=['NCHW', 'channels_last'])
def test_no_map_is_copied(memory_format, fused):
    model = timm.create_model(TINY).eval()
    if fused:
        model = reparameterize_model(model)
    smallest = 2 * 32 * 4 * 5  # numbers in the smallest map of the batch; in the tokens there are fewer
    images = torch.randn(2, 3, 128, 160).to(memory_format=memory_format)
    model = model.to(memory_format=memory_format)
    with torch.no_grad(), Recorder() as recorder:
        model(images)
    copies, strange = [], []
    for func, read, written in recorder.calls:
        name = func.overloadpacket.__name__
        if name in ('clone', 'copy_', 'contiguous', '_to_copy', 'reshape') and written[0].numel() >= smallest:
            copies.append((str(func), tuple(written[0].shape)))
        if name in ('convolution', '_convolution') and read[0].shape[2] > 1:
            maps = read[0], written[0]
            strange += [tuple(t.shape) for t in maps if not t.is_contiguous(memory_format=memory_format)]
    assert not copies
    assert not strange


def test_the_search_for_copies_finds_one():
    with torch.no_grad(), Recorder() as recorder:
        torch.randn(2, 16, 8, 8).to(memory_format=torch.channels_last).reshape(2, 16 * 64)
    assert 'clone' in [func.overloadpacket.__name__ for func, _, _ in recorder.calls]


def depthwise_convolutions(model: nn.Module, images: torch.Tensor) -> List[Tuple[torch.Tensor, torch.Tensor]]:
    """Inputs and outputs of the depthwise convolutions in one inference."""
    with torch.no_grad(), Recorder() as recorder:
        model(images)
    found = [(read[0], written[0]) for func, read, written in recorder.calls
             if func.overloadpacket.__name__ == 'convolution' and read[1].shape[1] == 1]
    assert len(found) >= 8
    return found


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=['NCHW', 'channels_last'])
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_in_16_bits_no_depthwise_convolution_has_several_outputs_per_input_channel(dtype, memory_format):
    """cuDNN would run one kernel per channel."""
    model = timm.create_model(TINY, dtype=dtype).eval().to(memory_format=memory_format)
    images = torch.randn(2, 3, 64, 96, dtype=dtype).to(memory_format=memory_format)
    for form in model, reparameterize_model(model):
        for x, y in depthwise_convolutions(form, images):
            assert x.shape[1] == y.shape[1] and x.is_contiguous(memory_format=memory_format)


def test_in_autocast_for_cuda_none_has_either_after_frozen_norms():
    """Frozen norms return float32, which autocast converts in the convolution itself."""
    with FakeTensorMode(), torch.device('cuda'):
        model, images = freeze_batch_norm_2d(timm.create_model(TINY).eval()), torch.empty(2, 3, 64, 96)
        torch.set_autocast_enabled('cuda', True)  # torch.autocast would not, where there is no GPU
        try:
            convolutions = depthwise_convolutions(model, images)
        finally:
            torch.set_autocast_enabled('cuda', False)
    for x, y in convolutions:
        assert x.dtype == torch.float16 and x.shape[1] == y.shape[1]


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=['NCHW', 'channels_last'])
@pytest.mark.parametrize('dtype, eps', [(torch.float64, 1e-12), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize('stride, dilation', [(1, 1), (2, 1), (1, 2)])
def test_a_depthwise_convolution_is_the_same_in_every_dtype(stride, dilation, dtype, eps, memory_format):
    torch.manual_seed(0)
    args = 4, 12, 3, stride, dilation, dilation, 4
    plain, ours = (layer(*args, dtype=torch.float64) for layer in (nn.Conv2d, DepthwiseConv2d))
    ours.load_state_dict(plain.state_dict())
    ours = ours.to(dtype, memory_format=memory_format)
    x = torch.randn(2, 4, 9, 11, dtype=torch.float64, requires_grad=True)
    x_ours = x.detach().to(dtype, memory_format=memory_format).requires_grad_()
    y, y_ours = plain(x), ours(x_ours)
    assert y_ours.is_contiguous(memory_format=memory_format)
    y.square().sum().backward()
    y_ours.square().sum().backward()
    for actual, expected in [(y_ours, y), (x_ours.grad, x.grad), *zip(
            (p.grad for p in ours.parameters()), (p.grad for p in plain.parameters()), strict=True)]:
        assert actual.dtype == dtype and (actual - expected).abs().max() <= eps * expected.abs().max()


@pytest.mark.parametrize('training', [False, True])
def test_an_accelerator_is_never_waited_for(training):
    with FakeTensorMode():
        model = timm.create_model(TINY, device='cuda').train(training)
        images = torch.empty(2, 3, 64, 96, device='cuda')
        with Recorder() as recorder:
            model(images)
    assert len(recorder.calls) > 100
    for func, read, written in recorder.calls:
        # what reads a value on the host, and what has a shape that depends on values
        assert torch.Tag.data_dependent_output not in func.tags, func
        assert torch.Tag.dynamic_output_shape not in func.tags, func
        # what is copied between host and accelerator
        assert {t.device.type for t in read + written} <= {'cuda'}, func


def test_derivatives_of_dynamic_relu_are_right_to_second_order():
    torch.manual_seed(1)
    act = DynamicReLU(6, 8, dtype=torch.float64)
    for t in act.fc1.weight, act.fc2.weight, act.fc2.bias:
        torch.nn.init.normal_(t, std=3.)
    z0 = torch.randn(2, 8, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 6, 2, 1, dtype=torch.float64, requires_grad=True)

    t1, t2 = act.fc2(act.fc1(z0).relu()).chunk(2, dim=1)
    for t in t1, t2:
        assert (t < -3).any() and (t > 3).any() and (t.abs() < 3).any(), 'both limits of the slopes, and between'

    names = [name for name, _ in act.named_parameters()]

    def activate(x: torch.Tensor, z0: torch.Tensor, *params: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(act, dict(zip(names, params, strict=True)), (x, z0))

    inputs = (x, z0, *act.parameters())
    modes = dict(check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True)
    assert torch.autograd.gradcheck(activate, inputs, **modes)
    assert torch.autograd.gradgradcheck(activate, inputs, check_fwd_over_rev=True, check_batched_grad=True)


def test_compiling_a_fused_model_finds_one_graph_and_other_batch_sizes_one_more():
    torch._dynamo.reset()
    model = reparameterize_model(timm.create_model(TINY).eval())
    counter = CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with torch.no_grad():
        for batch in 2, 3, 5, 15:  # from 16 on, PyTorch itself chooses another convolution on a CPU and compiles again
            images = torch.randn(batch, 3, 64, 64)
            torch.testing.assert_close(compiled(images), model(images))
    assert counter.frame_count <= 2
