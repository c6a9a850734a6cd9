"""A Mobile-Former is its parameters and buffers: who fills those in has the model, and hooks see what it computes."""
from typing import Any, Dict

import pytest
import timm
import torch
import torch.nn as nn
from test_model import TINY, assert_close, images, tiny
from timm.utils import reparameterize_model
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

from timm_mobileformer.layers import DepthwiseConv2d

LAYERS = {nn.Conv2d, DepthwiseConv2d, nn.Linear, nn.BatchNorm1d, nn.BatchNorm2d, nn.LayerNorm}


@pytest.fixture(params=['as trained', 'reparameterized', 'features_only'])
def model(request):
    if request.param == 'features_only':
        return tiny(features_only=True)
    return reparameterize_model(tiny()) if request.param == 'reparameterized' else tiny()


# What a model holds

def test_every_tensor_is_a_parameter_or_a_persistent_buffer(model):
    held = {id(t) for m in model.modules() for t in tree_leaves(vars(m)) if isinstance(t, torch.Tensor)}
    assert held == {id(t) for t in model.state_dict(keep_vars=True).values()}


def test_every_weight_but_the_tokens_belongs_to_a_layer_that_is_called(model):
    called = []
    for m in model.modules():
        m.register_forward_hook(lambda m, args, out: called.append(m))
    model(images())
    for name, m in model.named_modules():
        if any(parameter != 'tokens' for parameter, _ in m.named_parameters(recurse=False)):
            assert type(m) in LAYERS and called.count(m) == 1, name


def test_folding_adds_no_class_of_layer():
    assert {type(m) for m in reparameterize_model(tiny()).modules()} < {type(m) for m in tiny().modules()}


# What hooks see

@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=['NCHW', 'channels_last'])
def test_hooks_see_the_same_with_and_without_gradients_and_may_keep_it(model, memory_format):
    seen: Dict[bool, Any] = {True: [], False: []}

    def look(module: nn.Module, args: Any, out: Any) -> None:
        tensors = [t for t in tree_leaves((args, out)) if isinstance(t, torch.Tensor)]
        seen[torch.is_grad_enabled()].append((module, [(t, t.detach().clone()) for t in tensors]))

    for m in model.modules():
        m.register_forward_hook(look)
    x = images().to(memory_format=memory_format)
    for enabled in seen:
        with torch.set_grad_enabled(enabled):
            model.to(memory_format=memory_format)(x)
    for (module, tensors), (other_module, others) in zip(*seen.values(), strict=True):
        assert module is other_module
        for (kept, then), (other_kept, other_then) in zip(tensors, others, strict=True):
            assert torch.equal(kept, then) and torch.equal(other_kept, other_then), f'changed after {type(module)}'
            assert_close(kept, other_kept)


# Ways to fill a model

def assign(model: Any, state: Dict[str, torch.Tensor]) -> Any:
    model.load_state_dict(state, assign=True)
    return model


def load_after_to_empty(model: Any, state: Dict[str, torch.Tensor]) -> Any:
    model.to_empty(device='cpu')
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data.fill_(float('nan') if tensor.is_floating_point() else -1)
    model.load_state_dict(state)
    return model


def set_one_by_one(model: Any, state: Dict[str, torch.Tensor]) -> Any:
    parameters = {name for name, _ in model.named_parameters()}
    for name, tensor in state.items():
        module, _, attribute = name.rpartition('.')
        setattr(model.get_submodule(module), attribute, nn.Parameter(tensor) if name in parameters else tensor)
    return model


def call_with(model: Any, state: Dict[str, torch.Tensor]) -> Any:
    return lambda x: functional_call(model, state, (x,))


@pytest.mark.parametrize('fused', [False, True], ids=['as trained', 'reparameterized'])
@pytest.mark.parametrize('fill', [assign, load_after_to_empty, set_one_by_one, call_with])
def test_a_model_on_the_meta_device_needs_nothing_but_the_state(fill, fused):
    form = reparameterize_model if fused else lambda m: m
    model = form(tiny())
    filled = fill(form(timm.create_model(TINY, device='meta').eval()), model.state_dict())
    assert torch.equal(filled(images()), model(images()))


def test_a_model_that_was_moved_in_inference_mode_can_be_trained(model):
    with torch.inference_mode():
        model.to('cpu')
        model(images())
    sum(t.square().mean() for t in tree_leaves(model.train()(images()))).backward()
    assert all(p.grad is not None for p in model.parameters())
