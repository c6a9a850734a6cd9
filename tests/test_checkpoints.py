"""Checkpoints, the authors' and ours, load through timm's ordinary ways, or are refused by naming what is wrong."""
import argparse
from typing import Any, Dict

import pytest
import timm
import torch
from authors import ANSWERS, EVAL_CASES, VARIANTS, author_input, author_state_dict, sketch
from safetensors.torch import load_file, save_file
from timm.models import load_checkpoint
from timm.utils import CheckpointSaver, reparameterize_model

from timm_mobileformer import checkpoint_filter_fn

ANSWER = load_file(ANSWERS)
_, (HEIGHT, WIDTH, BATCH, SEED), *_ = EVAL_CASES
SMALL = '26m'
Tensors = Dict[str, torch.Tensor]


def assert_answers_as_the_authors(model: Any, variant: str) -> None:
    with torch.no_grad():
        logits = model.double().eval()(author_input(HEIGHT, WIDTH, BATCH, SEED))
    answer = ANSWER[f'{variant}.{HEIGHT}x{WIDTH}.logits']
    torch.testing.assert_close(sketch(logits), answer, rtol=1e-9, atol=1e-9)


def zeros_like(tensors: Tensors) -> Tensors:
    return {k: torch.zeros_like(v) for k, v in tensors.items()}


def ddp(tensors: Tensors) -> Tensors:
    return {f'module.{k}': v for k, v in tensors.items()}


WRAPPERS = {
    'plain': lambda t: t,
    'module': ddp,
    'state_dict': lambda t: {'state_dict': t, 'epoch': 3},
    'state_dict and module': lambda t: {'state_dict': ddp(t), 'arch': 'mobile_former', 'metric': 71.},
    'model': lambda t: {'model': ddp(t), 'optimizer': {}},
    'model_ema before model': lambda t: {'model': zeros_like(t), 'model_ema': t},
    'args': lambda t: {'state_dict': t, 'args': argparse.Namespace(model='mobile_former'), 'optimizer': {}},
    'ema before state_dict': lambda t: {'state_dict': zeros_like(t), 'state_dict_ema': t},
    'ema and module': lambda t: {'state_dict': ddp(zeros_like(t)), 'state_dict_ema': ddp(t)},
}


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
@pytest.mark.parametrize('variant', VARIANTS)
def test_an_authors_file_loads_by_pretrained(variant, suffix, tmp_path):
    path = tmp_path / f'checkpoint{suffix}'
    (save_file if suffix == '.safetensors' else torch.save)(author_state_dict(variant, SEED), path)
    model = timm.create_model(f'mobileformer_{variant}', pretrained=True, dtype=torch.float64,
                              pretrained_cfg_overlay=dict(file=str(path)))
    assert_answers_as_the_authors(model, variant)


@pytest.mark.parametrize('wrap', WRAPPERS.values(), ids=list(WRAPPERS))
def test_wrappers_of_training_scripts_are_taken_off(wrap, tmp_path):
    checkpoint = wrap(author_state_dict(SMALL, SEED))
    if 'args' in checkpoint:
        pytest.importorskip('timm', '1.0.26', reason='timm reads no arguments as data before 1.0.26')
    path = str(tmp_path / 'checkpoint.pth.tar')
    torch.save(checkpoint, path)
    name, kwargs = f'mobileformer_{SMALL}', dict(dtype=torch.float64)

    for overlay in dict(file=path), dict(state_dict=checkpoint):
        model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)
        assert_answers_as_the_authors(model, SMALL)

    model = timm.create_model(name, **kwargs)
    load_checkpoint(model, path, filter_fn=checkpoint_filter_fn)
    assert_answers_as_the_authors(model, SMALL)


def test_the_weights_before_averaging_can_be_had_too(tmp_path):
    tensors = author_state_dict(SMALL, SEED)
    torch.save({'state_dict': tensors, 'state_dict_ema': zeros_like(tensors)}, tmp_path / 'checkpoint.pth')
    model = timm.create_model(f'mobileformer_{SMALL}', dtype=torch.float64)
    load_checkpoint(model, str(tmp_path / 'checkpoint.pth'), use_ema=False, filter_fn=checkpoint_filter_fn)
    assert_answers_as_the_authors(model, SMALL)


@pytest.mark.parametrize('kwargs', [
    dict(num_classes=7), dict(num_classes=0), dict(in_chans=1), dict(in_chans=1, num_classes=7),
    dict(features_only=True), dict(features_only=True, out_indices=(1,), in_chans=4),
])
def test_another_task_takes_what_fits_of_an_authors_file(kwargs):
    tensors = {k: v.float() for k, v in author_state_dict(SMALL, SEED).items()}
    overlay = dict(state_dict=tensors)
    model = timm.create_model(f'mobileformer_{SMALL}', pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)
    trunk = model.model if kwargs.get('features_only') else model
    assert torch.equal(trunk.stages[0][0].conv1.conv.weight, tensors['features.0.conv.0.weight'])
    expected = tensors['stem.0.weight']
    if kwargs.get('in_chans') == 1:
        expected = expected.sum(1, keepdim=True)
    if kwargs.get('in_chans') != 4:
        assert torch.equal(trunk.stem.conv.weight, expected)
    model.eval()(torch.zeros(1, kwargs.get('in_chans', 3), 64, 64))


def test_our_own_layout_passes_untouched():
    model = timm.create_model(f'mobileformer_{SMALL}')
    tensors = model.state_dict()
    filtered = checkpoint_filter_fn(tensors, model)
    assert list(filtered) == list(tensors)
    assert all(filtered[k].data_ptr() == t.data_ptr() and torch.equal(filtered[k], t) for k, t in tensors.items())


def test_a_checkpoint_that_train_py_saved_loads_by_checkpoint_path(tmp_path):
    model = timm.create_model('test_mobileformer', num_classes=5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    saver = CheckpointSaver(model, optimizer, checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path))
    saver.save_checkpoint(epoch=0, metric=50.)
    path = str(tmp_path / 'last.pth.tar')
    loaded = timm.create_model('test_mobileformer', num_classes=5, checkpoint_path=path)
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize('wrap', [
    torch.nn.DataParallel, torch.compile, torch.nn.Sequential, lambda m: torch.nn.DataParallel(torch.compile(m)),
    lambda m: m.stages.__setitem__(1, torch.compile(m.stages[1])) or m,
], ids=['parallel', 'compiled', 'in another', 'both', 'a compiled part'])
@pytest.mark.parametrize('num_classes', [1000, 0])
def test_the_tensors_have_the_names_of_the_model_that_is_given(wrap, num_classes):
    model = timm.create_model(f'mobileformer_{SMALL}', dtype=torch.float64, num_classes=num_classes)
    tensors = author_state_dict(SMALL, SEED)
    model = wrap(model)
    keys = model.load_state_dict(checkpoint_filter_fn(tensors, model), strict=num_classes > 0)
    assert not keys.missing_keys and len(keys.unexpected_keys) == (0 if num_classes else 2)
    first = next(t for name, t in model.state_dict().items() if name.endswith('tokens'))
    assert torch.equal(first, tensors['tokens.weight'])


def test_a_features_only_model_takes_what_it_has_a_place_for():
    model, tensors = timm.create_model(f'mobileformer_{SMALL}', features_only=True), author_state_dict(SMALL)
    with pytest.raises(RuntimeError, match='unexpected: classifier.conv.1.weight'):
        checkpoint_filter_fn(tensors, model)
    assert not model.load_state_dict(checkpoint_filter_fn(tensors, model, strict=False), strict=False).missing_keys


@pytest.mark.parametrize('model', [
    lambda: timm.create_model('resnet10t'), lambda: reparameterize_model(timm.create_model(f'mobileformer_{SMALL}'))])
@pytest.mark.parametrize('tensors', [author_state_dict(SMALL), {}])
def test_a_model_that_checkpoints_do_not_belong_to_is_refused(model, tensors):
    with pytest.raises(TypeError, match='a Mobile-Former as create_model returns it, before reparameterize_model'):
        checkpoint_filter_fn(tensors, model())


def refuse(tensors: Tensors, *names: str) -> None:
    """Every way to load refuses `tensors`, and the error names what is wrong."""
    model = timm.create_model(f'mobileformer_{SMALL}')
    before = {k: t.clone() for k, t in model.state_dict().items()}
    for load in (
        lambda: model.load_state_dict(checkpoint_filter_fn(tensors, model)),
        lambda: timm.create_model(
            f'mobileformer_{SMALL}', pretrained=True, pretrained_cfg_overlay=dict(state_dict=dict(tensors))),
    ):
        with pytest.raises(RuntimeError) as e:
            load()
        assert all(name in str(e.value) for name in names), e.value
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_a_missing_tensor_is_named():
    tensors = author_state_dict(SMALL)
    del tensors['features.3.hyper2.hyper.0.bias']
    refuse(tensors, 'missing', 'features.3.hyper2.hyper.0.bias')


def test_a_missing_classifier_is_named():
    tensors = author_state_dict(SMALL)
    del tensors['classifier.classifier.1.weight']
    refuse(tensors, 'missing', 'classifier')


def test_an_unexpected_tensor_is_named():
    refuse({**author_state_dict(SMALL), 'features.9.conv1.0.weight': torch.zeros(1)},
           'unexpected', 'features.9.conv1.0.weight')


def test_a_size_mismatch_is_named_with_both_shapes():
    tensors = author_state_dict(SMALL)
    tensors['features.0.conv.0.weight'] = torch.zeros(24, 1, 5, 5)
    refuse(tensors, 'size mismatch', '(24, 1, 5, 5)', '(24, 1, 3, 3)')


def test_a_size_mismatch_has_the_name_in_the_checkpoint():
    tensors = author_state_dict(SMALL)
    tensors['features.1.local_global.alpha.0.weight'] = torch.zeros(11, 128)
    refuse(tensors, 'size mismatch', 'features.1.local_global.alpha.0.weight (11, 128) instead of (12, 128)')


@pytest.mark.parametrize('lenient', [dict(features_only=True), dict(pretrained_strict=False)])
def test_a_backbone_without_head_loads_where_timm_asks_for_no_more(lenient, caplog):
    backbone = {k: v for k, v in author_state_dict(SMALL).items() if not k.startswith('classifier.')}
    overlay = dict(state_dict={**backbone, 'decoder.weight': torch.zeros(1)})
    model = timm.create_model(f'mobileformer_{SMALL}', pretrained=True, pretrained_cfg_overlay=overlay, **lenient)
    assert 'missing: classifier.' in caplog.text and 'unexpected: decoder.weight' in caplog.text
    tokens = getattr(model, 'model', model).tokens
    torch.testing.assert_close(tokens.double(), backbone['tokens.weight'].double(), rtol=1e-6, atol=1e-6)
    overlay['state_dict']['features.0.conv.0.weight'] = torch.zeros(24, 1, 5, 5)
    with pytest.raises(RuntimeError, match='size mismatch'):
        timm.create_model(f'mobileformer_{SMALL}', pretrained=True, pretrained_cfg_overlay=overlay, **lenient)


@pytest.mark.parametrize('other', [v for v in VARIANTS if v != SMALL])
def test_the_checkpoint_of_another_variant_is_refused(other):
    refuse(author_state_dict(other), 'size mismatch')


def test_a_checkpoint_of_ours_that_does_not_fit_is_refused():
    tensors = timm.create_model('mobileformer_52m').state_dict()
    del tensors['tokens']
    refuse(tensors, 'missing: tokens', 'size mismatch')


def test_a_foreign_checkpoint_is_refused():
    refuse(timm.create_model('resnet18').state_dict(), 'missing', 'final_conv.', 'unexpected', 'bn1.bias', ' more')


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path):
    pytest.importorskip('timm', '1.0.26', reason='timm may run the code before 1.0.26')

    class Code:
        def __reduce__(self):
            return print, ('this ran',)

    path = tmp_path / 'checkpoint.pth'
    torch.save({'state_dict': Code()}, path)
    with pytest.raises(RuntimeError, match='weights_only'):
        timm.create_model(f'mobileformer_{SMALL}', pretrained=True, pretrained_cfg_overlay=dict(file=str(path)))
