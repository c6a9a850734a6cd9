"""What a user of timm may expect of a Mobile-Former, as far as timm's own suite (timm_suite.py) does not check it."""
import copy
import io
import math
import pickle
import re
from typing import Any, List

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
import torch.nn.utils.prune as prune
from timm.layers import freeze_batch_norm_2d
from timm.models._manipulate import group_parameters
from timm.optim import create_optimizer_v2
from timm.utils import reparameterize_model
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, jacrev, jvp, stack_module_state, vmap
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.flop_counter import FlopCounterMode

from timm_mobileformer import MobileFormer

TINY = 'test_mobileformer'
THREE_BLOCKS = (('bneck-lite', 2, 8, 1),), (('M-F-down', (2, 2), 16, 2), ('M-F', 2, 16, 1))
TABLE = {  # exact parameters; millions of multiply-adds of convolutions and matrix products at 224 x 224
    'mobileformer_26m': (3_232_788, 23.55),
    'mobileformer_52m': (3_469_092, 49.29),
    'mobileformer_96m': (4_585_252, 92.02),
    'mobileformer_151m': (7_595_828, 146.25),
    'mobileformer_214m': (9_425_920, 208.37),
    'mobileformer_294m': (11_422_648, 286.73),
    'mobileformer_508m': (13_976_976, 498.47),
}


def lively(model: Any, seed: int = 0) -> Any:
    """Numbers as large as trained ones, so that every part of the network matters to the logits; for inference."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith('running_var'):
                tensor.uniform_(0.5, 1.5, generator=generator)
            elif tensor.ndim == 1:
                tensor.normal_(float(name.endswith('.weight')), 0.1, generator=generator)
            elif tensor.ndim > 1:
                fan_in = tensor[0].numel() if name != 'tokens' else 1
                tensor.normal_(0, 1.15 / math.sqrt(fan_in), generator=generator)
    return model.eval()


def tiny(**kwargs: Any) -> Any:
    return lively(timm.create_model(TINY, **kwargs))


def images(height: int = 64, width: int = 96, batch: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def assert_close(actual: Any, expected: Any, rtol: float = 1e-4, atol: float = 1e-4) -> None:
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


# The family

def test_all_eight_models_are_in_timms_lists():
    assert set(timm.list_models('*mobileformer*')) == {*TABLE, TINY}
    assert set(timm.list_models(module='mobileformer')) == {*TABLE, TINY}


@pytest.mark.parametrize('name', TABLE)
def test_parameters_are_those_of_the_table(name):
    model = timm.create_model(name, device='meta')
    assert sum(p.numel() for p in model.parameters()) == TABLE[name][0]


@pytest.mark.parametrize('name', TABLE)
def test_multiply_adds_are_at_most_those_of_the_table(name):
    model = timm.create_model(name, device='meta').eval()
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, 224, 224, device='meta'))
    assert counter.get_total_flops() / 2 < (TABLE[name][1] + 0.005) * 1e6


@pytest.mark.parametrize('no_grad', [torch.no_grad, torch.inference_mode])
def test_flops_can_be_counted_without_gradients(no_grad):
    model = tiny()
    with FlopCounterMode(display=False) as counter:
        model(images())
    with no_grad(), FlopCounterMode(display=False) as other:
        model(images())
    assert other.get_total_flops() == counter.get_total_flops() > 0


def test_the_tiny_model_is_tiny():
    model = timm.create_model(TINY, device='meta')
    assert sum(p.numel() for p in model.parameters()) < 500_000
    assert model.pretrained_cfg['input_size'] == (3, 160, 160)


def test_images_are_prepared_as_the_authors_did():
    data = timm.data.resolve_model_data_config(timm.create_model('mobileformer_294m', device='meta'))
    assert data['input_size'] == (3, 224, 224)
    assert data['crop_pct'] == 0.875
    assert data['interpolation'] == 'bilinear'
    assert data['mean'] == timm.data.IMAGENET_DEFAULT_MEAN
    assert data['std'] == timm.data.IMAGENET_DEFAULT_STD


def test_the_defaults_of_the_class_are_294m():
    ours, named = MobileFormer(device='meta'), timm.create_model('mobileformer_294m', device='meta')
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in named.state_dict().items()}


@pytest.mark.parametrize('row', [('M-F', 2, 8, 2), ('mf', 2, 8, 1)])
def test_an_unknown_kind_of_block_or_stride_is_refused(row):
    with pytest.raises(AssertionError, match=re.escape(f'{row[0]!r}, {row[3]}')):
        MobileFormer(stages=((('bneck-lite', 2, 8, 1), row),), device='meta')


# Arguments of create_model

@pytest.mark.parametrize('kwargs, shape', [
    (dict(num_classes=7), (2, 7)),
    (dict(num_classes=0), (2, 128)),
    (dict(in_chans=1), (2, 1000)),
    (dict(global_pool='max'), (2, 1000)),
    (dict(global_pool=''), (2, 1000, 2, 3)),
    (dict(num_classes=0, global_pool=''), (2, 128, 2, 3)),
])
def test_head_and_stem_arguments(kwargs, shape):
    model = timm.create_model(TINY, **kwargs).eval()
    assert model(images()[:, :kwargs.get('in_chans', 3)]).shape == shape


@pytest.mark.parametrize('output_stride', [8, 16, 32])
def test_output_stride_dilates_instead_of_striding(output_stride):
    model = timm.create_model(TINY, output_stride=output_stride).eval()
    assert model.forward_features(images()).shape[2:] == (64 // output_stride, 96 // output_stride)
    assert max(info['reduction'] for info in model.feature_info) == output_stride
    model.load_state_dict(tiny().state_dict())  # no weight is another



class NoMobileToFormer(nn.Module):
    """Leaves the tokens as they are, so that they do not depend on the number of positions."""

    def forward(self, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return z


@pytest.mark.parametrize('output_stride', [8, 16])
def test_dilated_convolutions_see_at_every_other_position_what_strided_ones_see(output_stride):
    maps = []
    for stride in output_stride, 32:
        model = tiny(output_stride=stride, groups=2).double()
        for stage in model.stages:
            for block in stage:
                block.mobile_to_former = NoMobileToFormer()
        maps.append(model.forward_intermediates(images(128, 192).double(), intermediates_only=True))
    for dilated, strided in zip(*maps, strict=True):
        step = dilated.shape[2] // strided.shape[2]
        assert_close(dilated[:, :, ::step, ::step], strided, rtol=1e-9, atol=1e-9)
    assert step == 32 // output_stride


def test_an_unknown_output_stride_is_refused():
    with pytest.raises(AssertionError, match='output_stride must be 8, 16 or 32'):
        timm.create_model(TINY, output_stride=4)


def test_an_unknown_argument_is_refused():
    with pytest.raises(TypeError, match='no_such_argument'):
        timm.create_model(TINY, no_such_argument=1)


def test_drop_rate_is_the_dropout_before_the_classifier():
    model = tiny(drop_rate=0.5)
    assert_close(model(images()), tiny()(images()))
    assert not torch.equal(model.head_drop.train()(torch.ones(100)), torch.ones(100))


def test_drop_path_rate_grows_linearly_up_to_the_last_bridge():
    model = timm.create_model(TINY, drop_path_rate=0.18)
    blocks = [block for stage in model.stages for block in stage]
    for i, block in enumerate(blocks, 1):
        rates = [m.drop_prob for m in block.modules() if isinstance(m, timm.layers.DropPath)]
        assert rates == pytest.approx([0.18 * i / len(blocks)] * (1 if i == 1 else 4))
    assert model.mobile_to_former.drop_path.drop_prob == pytest.approx(0.18)


@pytest.mark.parametrize('channels_last', [False, True])
@pytest.mark.parametrize('part', ['mobile_to_former', 'former', 'mobile', 'former_to_mobile', 'down'])
def test_drop_path_drops_whole_images(part, channels_last):
    blocks = tiny(drop_path_rate=0.5).stages[4]
    module = blocks[0].mobile if part == 'down' else blocks[1].get_submodule(part)
    for m in module.modules():
        m.training = not isinstance(m, nn.BatchNorm2d)
    torch.manual_seed(0)
    x = torch.randn(1, 32, 4, 4).expand(64, -1, -1, -1)
    x = x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    z = torch.randn(1, 2, 32).expand(64, -1, -1)
    args = (z,) if part == 'former' else (x, z[:, 0]) if part in ('mobile', 'down') else (x, z)
    out = module(*args).flatten(1)
    same = (out - out[0]).abs().amax(1) < 1e-4
    other = (out - out[same.logical_not()][0]).abs().amax(1) < 1e-4
    assert 16 < same.sum() < 48
    assert torch.equal(other, same.logical_not()), 'dropped or kept, and nothing between'


def test_drop_path_is_for_training_alone():
    assert_close(tiny(drop_path_rate=0.5)(images()), tiny()(images()))


def test_device_and_dtype_are_those_asked_for():
    model = timm.create_model(TINY, device='meta', dtype=torch.bfloat16)
    tensors = [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]
    assert {(t.device.type, t.dtype) for t in tensors} == {('meta', torch.bfloat16)}


def test_pretrained_cfg_overlay_is_taken():
    overlay = dict(input_size=(3, 96, 96), crop_pct=1.0)
    model = timm.create_model(TINY, pretrained_cfg_overlay=overlay)
    assert timm.data.resolve_model_data_config(model)['input_size'] == (3, 96, 96)
    assert model.pretrained_cfg['crop_pct'] == 1.0


# Features and head

def test_features_are_one_map_whose_last_channels_are_the_first_token():
    model = tiny()
    features = model.forward_features(images())
    assert features.shape == (2, model.num_features, 2, 3)
    token = features[:, -model.token_dim:]
    assert torch.equal(token, token[:, :, :1, :1].expand_as(token))


def test_the_head_needs_nothing_but_the_features():
    model = tiny()
    features, logits = model.forward_features(images()), model(images())
    del model.stem, model.tokens, model.stages, model.mobile_to_former, model.final_conv
    assert_close(model.forward_head(features), logits)
    embedding = model.forward_head(features, pre_logits=True)
    assert embedding.shape == (2, model.head_hidden_size)
    assert_close(model.get_classifier()(embedding), logits)


def test_without_pooling_the_head_runs_at_every_position():
    model, dense = tiny(), tiny(global_pool='')
    features = model.forward_features(images())
    logits = dense.forward_head(features)
    for y, x in (0, 0), (0, 2), (1, 0), (1, 2):
        assert_close(logits[:, :, y, x], model.forward_head(features[:, :, y:y + 1, x:x + 1]))


def test_reset_classifier_gives_a_new_one():
    model = tiny()
    model.reset_classifier(7)
    assert model.num_classes == 7 and model(images()).shape == (2, 7)
    assert 0.005 < model.get_classifier().weight.std() < 0.02 and not model.get_classifier().bias.any()


def test_a_new_classifier_has_the_device_dtype_and_mode_of_the_model():
    model = timm.create_model(TINY, device='meta', dtype=torch.bfloat16).eval()
    model.reset_classifier(7, 'max')
    assert {(p.device.type, p.dtype) for p in model.get_classifier().parameters()} == {('meta', torch.bfloat16)}
    assert not any(m.training for m in model.modules())


@pytest.mark.parametrize('indices, chs', [([0], 8), ([1], 8), ([2], 16), ([4], 32)])
def test_a_pruned_model_holds_what_its_maps_need_and_nothing_else(indices, chs):
    model = tiny()
    maps = model.forward_intermediates(images(), indices=indices, intermediates_only=True)
    model.prune_intermediate_layers(indices)
    features = model(images())
    assert_close(features, maps[0])
    assert model.num_features == model.head_hidden_size == chs == features.shape[1]
    features.sum().backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]


@pytest.mark.parametrize('name', [*TABLE, TINY])
def test_features_only_gives_maps_at_reductions_2_to_32(name):
    model = timm.create_model(name, device='meta', features_only=True)
    maps = model(torch.empty(1, 3, 64, 96, device='meta'))
    assert model.feature_info.reduction() == [2, 4, 8, 16, 32]
    assert [m.shape[1] for m in maps] == model.feature_info.channels()
    assert [m.shape[2:] for m in maps] == [(64 // r, 96 // r) for r in (2, 4, 8, 16, 32)]
    assert all(model.model.get_submodule(n) for n in model.feature_info.module_name())


def test_out_indices_choose_maps():
    maps = tiny().forward_intermediates(images(), intermediates_only=True)
    for out_indices in (1, 3), (-2, -1):
        model = timm.create_model(TINY, features_only=True, out_indices=out_indices)
        model.model.load_state_dict(tiny().state_dict(), strict=False)
        assert_close(model.eval()(images()), [maps[i] for i in out_indices])


@pytest.mark.parametrize('feature_cls', ['hook', 'fx'])
def test_other_ways_to_features_find_the_same_maps(feature_cls):
    maps = []
    for kwargs in {}, dict(feature_cls=feature_cls):
        torch.manual_seed(0)
        maps.append(timm.create_model(TINY, features_only=True, **kwargs).eval()(images()))
    assert len(maps[0]) == 5
    assert_close(maps[1], maps[0])


def test_features_only_trains_with_gradient_checkpointing():
    grads = []
    for enable in False, True:
        torch.manual_seed(0)
        model = timm.create_model(TINY, features_only=True).double()
        model.model.set_grad_checkpointing(enable)
        sum(m.square().mean() for m in model.train()(images().double())).backward()
        assert all(p.grad is not None for p in model.parameters())
        grads.append([p.grad for p in model.parameters()])
    assert_close(grads[1], grads[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('name', [TINY, 'mobileformer_26m'])
def test_intermediates_are_the_maps_after_each_stage(name):
    model = lively(timm.create_model(name))
    seen = {}
    for info in model.feature_info:
        module = model.get_submodule(info['module'])
        last = module[-1] if isinstance(module, nn.ModuleList) else module
        last.register_forward_hook(lambda m, args, out, key=info['module']: seen.update({key: out}))
    final, maps = model.forward_intermediates(images(), norm=True)
    assert_close(final, model.forward_features(images()))
    for info, map_ in zip(model.feature_info, maps, strict=True):
        out = seen[info['module']]
        assert torch.equal(map_, out[0] if isinstance(out, tuple) else out)
    for indices in 2, [0, 3], [-1]:
        _, some = model.forward_intermediates(images(), indices=indices)
        chosen = maps[-2:] if indices == 2 else [maps[i] for i in indices]
        assert_close(some, chosen)
        early = model.forward_intermediates(images(), indices=indices, stop_early=True, intermediates_only=True)
        assert_close(early, chosen)


def test_stop_early_runs_no_stage_after_the_last_map():
    model = tiny()
    for block in model.stages[3]:
        block.register_forward_hook(lambda m, args, out: pytest.fail('ran a stage too many'))
    final, maps = model.forward_intermediates(images(), indices=[2], stop_early=True)
    assert torch.equal(final, maps[0])


def test_tokens_come_beside_the_maps_as_a_vision_transformer_returns_prefix_tokens():
    model, vit = tiny(), timm.create_model('vit_tiny_patch16_224', depth=2, img_size=160).eval()
    _, ours = model.forward_intermediates(images(), return_prefix_tokens=True)
    theirs = vit.forward_intermediates(torch.zeros(2, 3, 160, 160), return_prefix_tokens=True, intermediates_only=True)
    assert [type(item) for item in ours] == [tuple] * 5
    assert len(ours[0]) == len(theirs[0]) == 2 and type(theirs[0]) is tuple
    maps = model.forward_intermediates(images(), intermediates_only=True)
    for (map_, tokens), same in zip(ours, maps, strict=True):
        assert torch.equal(map_, same) and tokens.shape == (2, 2, 32)
    assert torch.equal(ours[0][1], model.tokens.expand(2, -1, -1))  # after the lite bottleneck
    assert not torch.equal(ours[-1][1][0], ours[-1][1][1])


def test_other_output_formats_are_refused():
    with pytest.raises(AssertionError, match='output_fmt must be NCHW'):
        tiny().forward_intermediates(images(), output_fmt='NLC')


# Training

@pytest.mark.parametrize('name', [TINY, 'mobileformer_294m'])
def test_layer_decay_runs_from_stem_and_tokens_to_the_head(name):
    model = timm.create_model(name, device='meta')
    scales = {}
    names = {id(p): n for n, p in model.named_parameters()}
    for group in create_optimizer_v2(model, 'sgd', lr=0.1, layer_decay=0.5).param_groups:
        scales.update({names[id(p)]: group['lr_scale'] for p in group['params']})

    blocks = [f'stages.{i}.{j}.' for i, stage in enumerate(model.stages) for j in range(len(stage))]
    order = [('stem.', 'tokens'), *blocks[:-1], (blocks[-1], 'mobile_to_former.', 'final_conv.'),
             ('head_hidden.', 'classifier.')]
    for i, prefix in enumerate(reversed(order)):
        assert {s for n, s in scales.items() if n.startswith(prefix)} == {0.5 ** i}, prefix
    assert set(scales) == set(names.values())


def test_coarse_groups_are_the_stages():
    model = timm.create_model(TINY, device='meta')
    groups = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    assert groups['tokens'] == groups['stem.conv.weight'] == 0
    for i, stage in enumerate(model.stages, 1):
        assert {g for n, g in groups.items() if n.startswith(f'stages.{i - 1}.')} == {i}, stage


def test_weight_decay_spares_norms_and_biases_but_not_the_tokens():
    model = timm.create_model(TINY)
    decayed = {id(p) for g in create_optimizer_v2(model, 'adamw', weight_decay=0.1).param_groups
               if g['weight_decay'] for p in g['params']}
    assert id(model.tokens) in decayed
    for name, p in model.named_parameters():
        assert (id(p) in decayed) == (p.ndim > 1), name


def test_gradient_checkpointing_keeps_fewer_maps_and_changes_no_gradient():
    grads, kept = [], []

    def count(tensor: torch.Tensor) -> torch.Tensor:
        kept[-1] += 1
        return tensor

    for enable in False, True:
        model = tiny(num_classes=5, drop_path_rate=0.3).double().train()
        model.set_grad_checkpointing(enable)
        torch.manual_seed(0)
        kept.append(0)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
            loss = F.cross_entropy(model(images(batch=4).double()), torch.arange(4))
        loss.backward()
        grads.append([p.grad for p in model.parameters()])
    assert kept[1] < kept[0] / 4
    assert_close(grads[1], grads[0], rtol=1e-9, atol=1e-9)


def test_images_of_a_batch_do_not_mix_in_inference():
    model, x = tiny(), images(batch=3)
    assert_close(model(x), torch.cat([model(x[i:i + 1]) for i in range(3)]))


# Initialisation

def _created() -> Any:
    torch.manual_seed(0)
    return timm.create_model('mobileformer_294m')


def _after_to_empty() -> Any:
    model = timm.create_model('mobileformer_294m', device='meta').to_empty(device='cpu')
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data.fill_(float('nan') if tensor.is_floating_point() else -1)
    torch.manual_seed(0)
    model.init_weights()
    return model


@pytest.mark.parametrize('create', [_created, _after_to_empty])
def test_initialisation_is_the_authors(create):
    model = create()

    def assert_normal(tensor: torch.Tensor, std: float, name: str) -> None:
        error = 5 / math.sqrt(tensor.numel())  # five standard errors
        assert tensor.mean().abs() < error * std, name
        assert abs(tensor.std() / std - 1) < error, name

    assert_normal(model.tokens, 1., 'tokens')
    for name, m in model.named_modules():
        if isinstance(m, nn.Conv2d):
            fan_out = m.kernel_size[0] * m.kernel_size[1] * m.out_channels  # not divided by the groups
            assert_normal(m.weight, math.sqrt(2 / fan_out), name)
        elif isinstance(m, nn.Linear):
            assert_normal(m.weight, 0.01, name)
            assert not m.bias.any(), name
        elif isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d, nn.LayerNorm)):
            assert (m.weight == 1).all() and not m.bias.any() and m.eps == 1e-5, name
        if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)):
            assert not m.running_mean.any() and (m.running_var == 1).all() and m.num_batches_tracked == 0, name
            assert m.momentum == 0.1, name


def test_a_reparameterized_model_is_initialised_as_its_origin_is():
    models = tiny().double(), reparameterize_model(tiny().double())
    for model in models:
        torch.manual_seed(0)
        model.init_weights()
    x = images().double()
    features, fused_features = (model.forward_intermediates(x)[1] for model in models)
    assert_close(fused_features, features, rtol=1e-3, atol=1e-4)
    assert_close(models[1](x), models[0](x), rtol=1e-3, atol=1e-6)


def test_a_model_initialised_after_to_empty_computes_what_a_created_one_does():
    model = timm.create_model(TINY, device='meta').to_empty(device='cpu')
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data.fill_(float('nan') if tensor.is_floating_point() else -1)
    model.init_weights()
    assert_close(lively(model)(images()), tiny()(images()))


# Reparameterisation

def test_reparameterize_folds_every_norm_and_leaves_the_model_as_it_was():
    model, x = tiny().double(), images().double()
    before = copy.deepcopy(model.state_dict())
    fused = reparameterize_model(model)
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in fused.modules())
    assert_close(fused(x), model(x), rtol=1e-9, atol=1e-9)
    assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert any(isinstance(m, nn.BatchNorm1d) for m in model.modules())
    assert all(p.requires_grad for p in fused.parameters())
    frozen = reparameterize_model(model.requires_grad_(False))
    assert not any(p.requires_grad for p in frozen.parameters())


def test_a_reparameterized_model_is_still_a_timm_model():
    model, fused = tiny(), reparameterize_model(tiny())
    assert_close(
        fused.forward_intermediates(images(), return_prefix_tokens=True),
        model.forward_intermediates(images(), return_prefix_tokens=True))
    assert_close(torch.jit.script(fused)(images()), fused(images()))
    fused.reset_classifier(7, 'max')
    assert fused(images()).shape == (2, 7)
    fused.prune_intermediate_layers([2])
    assert fused(images()).shape == (2, 16, 8, 12)


# Compilers, exporters and other tools. Fused models are what is shipped, so both forms go through most.

@pytest.fixture(params=['as trained', 'reparameterized'])
def model(request):
    return reparameterize_model(tiny()) if request.param == 'reparameterized' else tiny()


def test_torchscript_keeps_the_function_and_can_be_saved(model):
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(model), buffer)
    buffer.seek(0)
    loaded = torch.jit.load(buffer)
    for size in (64, 96), (45, 33):
        assert_close(loaded(images(*size)), model(images(*size)))


def test_torchscript_trains_as_eager_does():
    grads = []
    for wrap in torch.jit.script, lambda m: m:
        model = wrap(tiny(num_classes=5).double().train())
        F.cross_entropy(model(images(batch=4).double()), torch.arange(4)).backward()
        grads.append({n: p.grad for n, p in model.named_parameters()})
    assert_close(grads[0], grads[1], rtol=1e-9, atol=1e-9)


def test_torchscript_takes_a_features_only_model():
    model = timm.create_model(TINY, features_only=True).eval()
    assert_close(torch.jit.script(model)(images()), model(images()))


def test_trace_keeps_the_function_at_other_sizes(model):
    traced = torch.jit.trace(model, images())
    assert_close(traced(images(45, 33, 3)), model(images(45, 33, 3)))


@pytest.mark.parametrize('name', [TINY, 'mobileformer_26m'])
def test_fx_keeps_the_function_at_other_sizes(name):
    model = lively(timm.create_model(name))
    graph = torch.fx.symbolic_trace(model)
    for size in (64, 96, 2), (45, 33, 3):
        assert_close(graph(images(*size)), model(images(*size)))


@pytest.mark.parametrize('training', [False, True])
def test_compile_finds_one_graph_and_another_batch_size_costs_at_most_one_more(training):
    torch._dynamo.reset()
    model = three_blocks().double().train(training).requires_grad_(training)
    counter = CompileCounterWithBackend('aot_eager' if training else 'eager')
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend=counter)
    for batch in 2, 3, 5:
        x = images(batch=batch).double()
        out, expected = compiled(x), model(x)
        assert_close(out, expected)
        if training:
            out.square().sum().backward()
            expected.square().sum().backward()
    assert counter.frame_count <= 2
    assert_close([p.grad for p in compiled.parameters()], [p.grad for p in model.parameters()])


def test_export_takes_any_batch_and_size(model):
    dims = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    program = torch.export.export(model, (images(),), dynamic_shapes=(dims,))
    for size in (64, 96, 2), (160, 128, 1), (45, 67, 3), (33, 40, 5), (64, 64, 0):
        assert_close(program.module()(images(*size)), model(images(*size)))


@pytest.fixture(scope='module', params=['torchscript', 'dynamo'])
def onnx_file(request, tmp_path_factory):
    """A model exported by either exporter, from a single image, for any batch and size."""
    for package in 'onnx', 'onnxscript', 'onnxruntime':
        pytest.importorskip(package, reason=f"{package} is missing, pip install 'timm_mobileformer[export]' brings it")
    if request.param == 'dynamo':
        dims = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
        kwargs: Any = dict(dynamo=True, dynamic_shapes=(dims,))
    else:
        axes = {'images': {0: 'batch', 2: 'height', 3: 'width'}, 'logits': {0: 'batch'}}
        kwargs = dict(dynamo=False, dynamic_axes=axes)
    path = str(tmp_path_factory.mktemp('onnx') / 'model.onnx')
    names = dict(input_names=['images'], output_names=['logits'])
    torch.onnx.export(three_blocks(), (images(batch=1),), path, **names, **kwargs)
    return path


def three_blocks() -> Any:
    """A block of each kind, which is exported and quantized sooner than the nine of the tiny model."""
    return lively(MobileFormer(8, 2, 32, THREE_BLOCKS, 32, num_classes=10))


def run_onnx(path: str, x: torch.Tensor) -> torch.Tensor:
    from onnxruntime import InferenceSession

    session = InferenceSession(path, providers=['CPUExecutionProvider'])
    return torch.from_numpy(session.run(['logits'], {'images': x.numpy()})[0])


def test_onnx_runtime_agrees_at_any_batch_and_size(onnx_file):
    for size in (64, 96, 2), (160, 160, 1), (45, 67, 3), (64, 64, 0):
        assert_close(run_onnx(onnx_file, images(*size)), three_blocks()(images(*size)).detach())


def test_every_weight_of_an_onnx_graph_is_an_initializer(onnx_file):
    import onnx

    graph = onnx.load(onnx_file).graph
    stored = {tensor.name for tensor in graph.initializer}
    layers = [node for node in graph.node if node.op_type in ('Conv', 'Gemm')]
    assert all(name in stored for node in layers for name in node.input[1:])
    layers += [node for node in graph.node if node.op_type == 'MatMul' and stored & set(node.input)]
    modules = list(three_blocks().modules())
    convolutions = [node for node in layers if node.op_type == 'Conv']
    assert len(convolutions) == sum(isinstance(m, nn.Conv2d) for m in modules)
    assert len(layers) == len(convolutions) + sum(isinstance(m, nn.Linear) for m in modules)


@pytest.mark.parametrize('kind', ['dynamic', 'static'])
def test_onnx_runtime_quantizes_every_weight(onnx_file, kind, tmp_path):
    import onnx
    from onnxruntime import quantization

    class Examples(quantization.CalibrationDataReader):
        batches = [{'images': images().numpy()}]

        def get_next(self):
            return self.batches.pop() if self.batches else None

    path = str(tmp_path / 'int8.onnx')
    if kind == 'dynamic':
        quantization.quantize_dynamic(onnx_file, path)
    else:
        quantization.quantize_static(
            onnx_file, path, Examples(), per_channel=True, op_types_to_quantize=['Conv', 'Gemm', 'MatMul'])
    graph = onnx.load(path).graph
    in_float = {t.name for t in graph.initializer if t.data_type == onnx.TensorProto.FLOAT}
    assert not [n for n in graph.node if n.op_type in ('Conv', 'Gemm', 'MatMul') and in_float & set(n.input[:2])]
    answers, expected = run_onnx(path, images()), three_blocks()(images())
    assert (answers - expected).norm() < 0.5 * expected.norm()  # random weights are sensitive


# Tools that differentiate a model in their own way, or rewrite its layers

def test_an_ensemble_runs_as_one_by_vmap(model):
    models = [model, lively(copy.deepcopy(model), seed=1)]
    stacked, x = stack_module_state(models), images()
    with torch.no_grad():
        answers = vmap(lambda state: functional_call(model, state, (x,)))(stacked)
        assert_close(answers, torch.stack([m(x) for m in models]))


@pytest.mark.parametrize('fused_attn', [0, 1])
def test_gradients_come_for_every_image_alone_by_vmap(monkeypatch, fused_attn):
    monkeypatch.setattr('timm.layers.config._USE_FUSED_ATTN', fused_attn)
    model = tiny(num_classes=5).double()
    params, buffers = dict(model.named_parameters()), dict(model.named_buffers())

    def loss(params: Any, image: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(functional_call(model, (params, buffers), (image[None],)), target[None])

    x, target = images().double(), torch.arange(2)
    of_each = vmap(grad(loss), (None, 0, 0))(params, x, target)
    for i in range(2):
        model.zero_grad()
        F.cross_entropy(model(x[i:i + 1]), target[i:i + 1]).backward()
        assert_close({n: g[i] for n, g in of_each.items()}, {n: p.grad for n, p in model.named_parameters()})


def test_jacobians_come_for_every_image_alone_by_vmap():
    model, x = tiny(num_classes=2), images(32, 32)  # as many classes as images: shapes do not tell them apart
    of_both = jacrev(model)(x)
    of_each = vmap(jacrev(lambda image: model(image[None])[0]))(x)
    assert_close(of_each, torch.stack([of_both[i, :, i] for i in range(2)]))


def test_forward_mode_and_second_derivatives_are_right_without_fused_attention(monkeypatch):
    monkeypatch.setattr('timm.layers.config._USE_FUSED_ATTN', 0)  # PyTorch has these derivatives of no fused kernel
    model = tiny(num_classes=5).double()
    x, direction = images(32, 32).double(), images(32, 32, seed=1).double()
    step = 1e-6 * direction

    _, along = jvp(model, (x,), (direction,))
    assert_close(along, (model(x + step) - model(x - step)) / 2e-6, rtol=1e-6, atol=1e-6)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return model(x).square().sum()

    curved = (grad(loss)(x + step) - grad(loss)(x - step)) / 2e-6
    assert_close(jvp(grad(loss), (x,), (direction,))[1], curved, rtol=1e-5, atol=1e-5)
    assert_close(torch.autograd.functional.hvp(loss, x, direction)[1], curved, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings('ignore:torch.ao.quantization is deprecated')
def test_dynamic_quantization_takes_the_linear_layers(model):
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert not any(type(m) is nn.Linear for m in quantized.modules())
    answers, expected = quantized(images()), model(images())
    assert not torch.equal(answers, expected)
    assert (answers - expected).norm() < 0.25 * expected.norm()  # random weights are sensitive


def test_pruned_weights_train_and_stay_away():
    model = tiny(num_classes=5).train()
    pruned = [(m, 'weight') for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    prune.global_unstructured(pruned, prune.L1Unstructured, amount=0.5)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(images()), torch.arange(2)).backward()
        optimizer.step()
    for module, name in pruned:
        prune.remove(module, name)
    weights = torch.cat([m.weight.flatten() for m, _ in pruned])
    assert (weights == 0).float().mean() == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize('rewrite', [
    lambda module: prune.l1_unstructured(module, 'weight', 0.5),
    weight_norm,
], ids=['masked', 'parametrized'])
@pytest.mark.parametrize('name', [
    'stem.conv', 'stages.1.0.mobile.conv2.conv', 'stages.1.0.mobile.act1.fc2', 'head_hidden.linear'])
@torch.no_grad()  # a masked weight that has a history cannot be copied
def test_a_rewritten_layer_is_not_folded_into(name, rewrite):
    model = tiny()
    rewrite(model.get_submodule(name))
    with pytest.raises(TypeError, match='before reparameterize_model, remove pruning masks and parametrizations'):
        reparameterize_model(model)


# Memory formats, dtypes, devices, copies

def test_channels_last_in_gives_channels_last_inside(model):
    x = images(160, 160)
    expected = model(x)
    model = model.to(memory_format=torch.channels_last)
    other = []

    def look(module: nn.Module, args: Any, out: Any) -> None:
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if t.ndim == 4 and min(t.shape[1:]) > 1 and not t.is_contiguous(memory_format=torch.channels_last):
                other.append(type(module).__name__)

    for m in model.modules():
        m.register_forward_hook(look)
    out = model(x.contiguous(memory_format=torch.channels_last))
    assert not other
    assert_close(out, expected)


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16, torch.float16])
def test_a_cast_model_answers_in_its_dtype(model, dtype):
    expected = model(images())
    out = model.to(dtype)(images().to(dtype))
    assert out.dtype == dtype
    error = (out - expected).abs().mean() / expected.abs().mean()
    assert error < {torch.float64: 1e-5, torch.bfloat16: 0.1, torch.float16: 0.02}[dtype]


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast_runs_forward_and_backward(dtype):
    model = tiny(num_classes=5)
    expected = model(images(batch=4))
    with torch.autocast('cpu', dtype):
        out = model(images(batch=4))
    assert (out - expected).abs().mean() / expected.abs().mean() < 0.1

    model.train()
    with torch.autocast('cpu', dtype):
        loss = F.cross_entropy(model(images(batch=4)), torch.arange(4))
    loss.backward()
    assert all(torch.isfinite(p.grad).all() and p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast_takes_frozen_norms_which_leave_maps_in_float32(dtype):
    model = freeze_batch_norm_2d(tiny(num_classes=5))
    expected = model(images(batch=4))
    with torch.autocast('cpu', dtype):
        out = model(images(batch=4))
    assert (out - expected).abs().mean() / expected.abs().mean() < 0.1
    out.float().square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_a_model_made_in_inference_mode_can_be_moved_outside():
    with torch.inference_mode():
        model = tiny()
    with torch.no_grad():
        assert_close(model.to('cpu')(images()), tiny()(images()))


def test_shapes_can_be_asked_of_a_meta_model():
    model = timm.create_model(TINY, device='meta')
    assert model(torch.empty(2, 3, 64, 96, device='meta')).shape == (2, 1000)


def test_a_fake_accelerator_runs_without_reading_a_value():
    pytest.importorskip('torch', '2.11', reason='the fake accelerator of an older torch asks for its driver')
    with FakeTensorMode():
        model = timm.create_model(TINY, device='cuda')
        for training in True, False:
            out = model.train(training)(torch.empty(2, 3, 64, 96, device='cuda'))
            assert out.shape == (2, 1000) and out.device.type == 'cuda'


@pytest.mark.parametrize('copied', [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=['deepcopy', 'pickle'])
def test_copies_compute_the_same_and_share_nothing(model, copied):
    other = copied(model)
    assert torch.equal(other(images()), model(images()))
    assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in other.parameters()}


@pytest.mark.parametrize('wrap', [lambda m: m, reparameterize_model, torch.jit.script], ids=[
    'as trained', 'reparameterized', 'scripted'])
@pytest.mark.parametrize('kwargs', [{}, {'global_pool': ''}, {'features_only': True}], ids=['logits', 'dense', 'maps'])
def test_a_batch_of_no_images_is_taken(kwargs, wrap):
    model = wrap(tiny(groups=2, **kwargs))
    for memory_format in torch.contiguous_format, torch.channels_last:
        x = images().contiguous(memory_format=memory_format)
        some, none = ([y] if isinstance(y, torch.Tensor) else y for y in (model(x), model(x[:0])))
        for t, empty in zip(some, none, strict=True):
            assert empty.shape == (0, *t.shape[1:])


@pytest.mark.parametrize('name', [TINY, 'mobileformer_26m', 'mobileformer_96m'])
def test_any_image_of_at_least_32_pixels_is_taken(name):
    model = timm.create_model(name)
    for height, width in (32, 32), (33, 47), (32, 161), (95, 64):
        x = images(height, width)
        model.train()(x).sum().backward()
        model.eval()
        assert torch.isfinite(model(x)).all()
        maps: List[torch.Tensor] = model.forward_intermediates(x, intermediates_only=True)
        for info, m in zip(model.feature_info, maps, strict=True):
            assert m.shape[2:] == (-(-height // info['reduction']), -(-width // info['reduction']))
