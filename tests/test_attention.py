"""Looking inside: attention_maps, and its pictures by `timm-mobileformer tokens`."""
import argparse
import re

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import ImageNetInfo, create_transform, resolve_model_data_config
from timm.optim import create_optimizer_v2
from timm.utils import CheckpointSaver, reparameterize_model

from timm_mobileformer import attention_maps
from timm_mobileformer.attention import BridgeAttention
from timm_mobileformer.cli import main
from timm_mobileformer.cli.attention_figure import draw
from timm_mobileformer.mobileformer import FormerToMobile, MobileToFormer

BLOCKS = ['stages.1.0', 'stages.1.1', 'stages.2.0', 'stages.3.0', 'stages.3.1', 'stages.4.0', 'stages.4.1']


def make_model(name='test_mobileformer', **kwargs):
    """A model whose attention is far from even, which it would be as initialised."""
    torch.manual_seed(0)
    model = timm.create_model(name, **kwargs)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.normal_(std=2 * module.in_features ** -0.5)
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(std=0.1)
    return model.eval()


def make_images(*size):
    return torch.randn(size, generator=torch.Generator().manual_seed(1))


def bridge_calls(model, images):
    """Inputs and output of every bridge, in order, in a call of the model that attention_maps has no part in."""
    calls = []
    hooks = [
        m.register_forward_hook(lambda m, args, out: calls.append((m, *args, out)))
        for m in model.modules() if isinstance(m, (MobileToFormer, FormerToMobile))]
    with torch.no_grad():
        model(images)
    for hook in hooks:
        hook.remove()
    return calls


def rebuild(bridge, x, z, attn):
    """A bridge's output, from its inputs and the attention that attention_maps returned."""
    heads = x.unflatten(1, (bridge.num_heads, -1))  # (B, n, c, H, W)
    if isinstance(bridge, MobileToFormer):
        gate = 2 * torch.nn.functional.hardsigmoid(bridge.gate(z))
        gathered = torch.einsum('bnmhw,bnchw->bmnc', attn, heads).flatten(2)
        return bridge.norm(z + bridge.proj(gate * gathered))
    v = bridge.v(z).unflatten(2, (bridge.num_heads, -1))  # (B, M, n, c)
    return x + torch.einsum('bnmhw,bmnc->bnchw', attn, v).flatten(1, 2)


# The maps

@pytest.mark.parametrize('name', ['test_mobileformer', 'mobileformer_26m'])
def test_every_block_has_both_directions_and_the_last_bridge_one(name):
    model = make_model(name)
    with torch.no_grad():
        maps = attention_maps(model, make_images(2, 3, 96, 64))
    num_tokens = model.tokens.shape[0]
    blocks = [f'stages.{i}.{j}' for i, s in enumerate(model.stages) for j in range(len(s)) if i + j > 0]
    assert [m.name for m in maps] == [*blocks, 'mobile_to_former']
    for m in maps[:-1]:
        stride = 2 if m.name.endswith('.0') else 1
        B, heads, M, H, W = m.mobile_to_former.shape
        assert (B, heads, M, H * 64) == (2, 2, num_tokens, W * 96)
        assert m.former_to_mobile.shape == (2, 2, num_tokens, H // stride, W // stride)
    assert maps[-1].mobile_to_former.shape == (2, 2, 1, 3, 2)
    assert maps[-1].former_to_mobile is None


def test_attention_sums_to_1_over_positions_and_over_tokens():
    with torch.no_grad():
        maps = attention_maps(make_model().double(), make_images(2, 3, 70, 61).double())
    assert [m.name for m in maps] == [*BLOCKS, 'mobile_to_former']
    for m in maps:
        total = m.mobile_to_former.sum((3, 4))
        torch.testing.assert_close(total, torch.ones_like(total))
        assert m.mobile_to_former.amax() > 1.5 / m.mobile_to_former[0, 0, 0].numel()  # not just even
        if m.former_to_mobile is not None:
            total = m.former_to_mobile.sum(2)
            torch.testing.assert_close(total, torch.ones_like(total))


@pytest.mark.parametrize('folded', [False, True], ids=['as_trained', 'reparameterized'])
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=['nchw', 'channels_last'])
@pytest.mark.parametrize('fused_attn', [0, 1], ids=['plain', 'fused_attn'])
def test_the_maps_are_what_the_forward_pass_used(monkeypatch, fused_attn, memory_format, folded):
    monkeypatch.setattr('timm.layers.config._USE_FUSED_ATTN', fused_attn)
    model = make_model().double().to(memory_format=memory_format)
    images = make_images(2, 3, 64, 96).double().to(memory_format=memory_format)
    if folded:
        model = reparameterize_model(model)
    calls = bridge_calls(model, images)
    with torch.no_grad():
        maps = attention_maps(model, images)
        attns = [a for m in maps for a in m[1:] if a is not None]
        assert len(attns) == len(calls) == 2 * len(BLOCKS) + 1
        for attn, (bridge, x, z, out) in zip(attns, calls, strict=True):
            torch.testing.assert_close(rebuild(bridge, x, z, attn), out, atol=1e-10, rtol=1e-10)


def test_features_only_and_the_whole_model_give_the_same_maps():
    model, images = make_model(), make_images(1, 3, 64, 64)
    features = timm.create_model('test_mobileformer', features_only=True)
    features.model.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():
        maps, whole = attention_maps(features, images), attention_maps(model, images)
    assert [m.name for m in maps] == BLOCKS
    for a, b in zip(maps, whole[:-1], strict=True):
        torch.testing.assert_close(a[1:], b[1:])


def test_autocast_has_the_maps_that_its_forward_pass_used():
    model, images = make_model(), make_images(1, 3, 64, 64)
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        calls = bridge_calls(model, images)
        attns = [a for m in attention_maps(model, images) for a in m[1:] if a is not None]
        for attn, (bridge, x, z, out) in zip(attns, calls, strict=True):
            assert (rebuild(bridge, x, z, attn) - out).float().norm() < 0.01 * out.float().norm()


@pytest.mark.parametrize('checkpointing', [False, True])
def test_gradients_flow_through_the_maps_as_the_caller_likes(checkpointing):
    model, images = make_model().double(), make_images(1, 3, 32, 32).double().requires_grad_()
    model.set_grad_checkpointing(checkpointing)
    model.stages[1].grad_checkpointing = True

    def entropy():
        return sum(torch.special.entr(a).sum() for m in attention_maps(model, images) for a in m[1:] if a is not None)

    with torch.no_grad():
        assert not entropy().requires_grad
    grad, = torch.autograd.grad(entropy(), images)
    step = torch.zeros_like(images).index_put_([torch.tensor(i) for i in (0, 1, 9, 20)], torch.tensor(1e-5).double())
    with torch.no_grad():
        images += step
        up = entropy()
        images -= 2 * step
        slope = (up - entropy()) / 2e-5
    torch.testing.assert_close(grad[0, 1, 9, 20], slope, rtol=1e-4, atol=1e-6)
    assert [stage.grad_checkpointing for stage in model.stages] == [checkpointing, True, *3 * [checkpointing]]


# The model afterwards

@pytest.mark.parametrize('images', [make_images(2, 3, 64, 64), make_images(2, 4, 64, 64)], ids=['fine', 'failing'])
def test_the_model_is_left_as_it_was(images):
    model = make_model().train()
    model.stages[1].eval()  # frozen by its owner
    state = {k: v.clone() for k, v in model.state_dict().items()}
    modes = {n: m.training for n, m in model.named_modules()}
    if images.shape[1] == 3:
        attention_maps(model, images)
    else:
        with pytest.raises(RuntimeError, match='channels'):
            attention_maps(model, images)
    assert {n: m.training for n, m in model.named_modules()} == modes
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)  # no running statistics gathered


def with_part(name, change):
    """A model with a part replaced by `change` of it, or changed in place."""
    model = make_model()
    part = model.get_submodule(name)
    if (changed := change(part)) is not None:
        model.set_submodule(name, changed)
    return model


@pytest.mark.parametrize(['make', 'kind'], [
    (lambda: timm.create_model('test_resnet'), 'not a ResNet'),
    (lambda: timm.create_model('test_vit', features_only=True), 'not a VisionTransformer'),
    (lambda: torch.compile(make_model()), 'not a compiled or scripted OptimizedModule'),
    (lambda: with_part('stages.1.0', lambda block: block.compile()), 'MobileFormerBlock stages.1.0'),
    (lambda: with_part('stages.1.0', torch.compile), 'OptimizedModule stages.1.0'),
    (lambda: with_part('stages.2', torch.compile), 'OptimizedModule stages.2'),
    (lambda: with_part('stages.1.0', torch.jit.script), 'RecursiveScriptModule stages.1.0'),
    (lambda: with_part('stages.4.1.former_to_mobile', torch.jit.script), 'stages.4.1.former_to_mobile'),
    (lambda: torch.jit.script(make_model()), 'not a compiled or scripted RecursiveScriptModule'),
    (lambda: torch.nn.Sequential(make_model()), 'not a Sequential'),
], ids=[
    'resnet', 'features', 'compiled', 'block compiled in place', 'block compiled', 'stage compiled', 'block scripted',
    'bridge scripted', 'scripted', 'wrapped'])
def test_what_cannot_be_looked_into_is_refused(make, kind):
    with pytest.raises(TypeError, match=kind):
        attention_maps(make(), make_images(1, 3, 64, 64))


@pytest.mark.parametrize('name', ['stages.3.1.mobile_to_former', 'stages.3.1.former_to_mobile', 'mobile_to_former'])
@pytest.mark.parametrize('times', [0, 2])
def test_a_bridge_that_is_not_called_once_is_no_map_too_few_or_in_another_row(name, times):
    model = make_model()
    bridge = model.get_submodule(name)

    def forward(x, z):
        for _ in range(times):
            out = bridge(x, z)
        return out if times else bridge.forward(x, z)

    bridge_and_more = torch.nn.Module()  # stands for any wrapper
    bridge_and_more.forward, bridge_and_more.bridge = forward, bridge
    model.set_submodule(name, bridge_and_more)
    with pytest.raises(TypeError, match='not every bridge of the model was called once and in order'):
        attention_maps(model, make_images(1, 3, 64, 64))


# The pictures

@pytest.fixture(scope='module')
def work(tmp_path_factory):
    """A folder with a training checkpoint of three classes at 64x64, photographs so to speak, and class names."""
    work = tmp_path_factory.mktemp('attention')
    args = argparse.Namespace(model='test_mobileformer', img_size=64, crop_pct=1.0)
    model = make_model(num_classes=3)
    CheckpointSaver(model, create_optimizer_v2(model, 'sgd'), args, checkpoint_dir=str(work)).save_checkpoint(0, 1.)
    generator = torch.Generator().manual_seed(2)
    for name in ('cat', 'dog'):
        pixels = F.interpolate(torch.rand(1, 3, 9, 12, generator=generator), (90, 120), mode='bilinear')
        Image.fromarray((pixels[0].permute(1, 2, 0) * 255).byte().numpy()).save(work / f'{name}.jpg')
    (work / 'folder').mkdir()
    (work / 'names.txt').write_text('Ameise\nBiene\nKuh\n')
    (work / 'text.png').write_text('no image')
    return work


@pytest.fixture
def run(work, monkeypatch, capsys):
    """Run the command in a folder of its own, and return its exit status, stdout and stderr."""
    pytest.importorskip('matplotlib', reason="draws with matplotlib: pip install 'timm_mobileformer[demo]'")
    monkeypatch.chdir(work)
    return lambda *argv: (main(['tokens', *map(str, argv)]), *capsys.readouterr())


USUAL = ('cat.jpg', '--model', 'test_mobileformer', '--checkpoint', 'last.pth.tar')


def test_the_command_draws_a_picture_and_prints_the_classes(run, work, tmp_path):
    out = tmp_path / 'new' / 'tokens.png'
    status, printed, err = run(*USUAL, '--output', out)
    assert (status, err) == (0, '')
    model = timm.create_model('test_mobileformer', num_classes=3, checkpoint_path=work / 'last.pth.tar').eval()
    config = resolve_model_data_config(model, dict(img_size=64, crop_pct=1.0))  # as it was trained
    with torch.no_grad():
        p = model(create_transform(**config)(Image.open(work / 'cat.jpg'))[None]).softmax(1)[0]
    assert printed.splitlines() == [
        f'cat.jpg -> {out}', *(f'{p[i]:7.1%}  class {i}' for i in p.argsort(descending=True).tolist())]
    with Image.open(out) as picture:
        assert min(picture.size) > 400 and len(picture.convert('RGB').getcolors(1 << 24)) > 1000


def test_the_maps_are_written_as_arrays(run, work, tmp_path):
    status, _, _ = run('cat.jpg', 'dog.jpg', *USUAL, '--output', tmp_path / 'tokens.png', '--npz')
    assert status == 0 and {p.suffix for p in tmp_path.iterdir()} == {'.png', '.npz'}
    model = timm.create_model('test_mobileformer', num_classes=3, checkpoint_path=work / 'last.pth.tar').eval()
    config = resolve_model_data_config(model, dict(img_size=64, crop_pct=1.0))
    with torch.no_grad():
        maps = attention_maps(model, create_transform(**config)(Image.open(work / 'dog.jpg'))[None])
    with np.load(tmp_path / 'tokens-2-dog.npz') as arrays:
        assert len(arrays) == 2 * len(maps) - 1
        for m in maps:
            torch.testing.assert_close(torch.from_numpy(arrays[f'{m.name}.mobile_to_former']), m.mobile_to_former[0])
            if m.former_to_mobile is not None:
                np.testing.assert_allclose(arrays[f'{m.name}.former_to_mobile'], m.former_to_mobile[0].numpy())


def test_many_images_make_many_pictures(run, tmp_path):
    status, out, err = run('cat.jpg', 'dog.jpg', *USUAL, '--output', tmp_path / 'tokens.svg')
    written = ['tokens-1-cat.svg', 'tokens-2-dog.svg', 'tokens-3-cat.svg']
    assert status == 0 and sorted(p.name for p in tmp_path.iterdir()) == written
    assert [line.split(' -> ')[1] for line in out.splitlines() if '->' in line] == [str(tmp_path / n) for n in written]


def test_classes_have_the_names_of_a_file_of_imagenet_or_of_the_weights(run, tmp_path):
    def names(*argv):
        status, out, err = run(*argv, '--output', tmp_path / 'tokens.png')
        assert status == 0, err
        return [line.split('%  ')[1] for line in out.splitlines()[1:]]

    assert {*names(*USUAL, '--class-map', 'names.txt')} == {'Ameise', 'Biene', 'Kuh'}
    torch.save(make_model().state_dict(), tmp_path / 'imagenet.pth')
    of_imagenet = names(*USUAL[:4], tmp_path / 'imagenet.pth')
    assert len(of_imagenet) == 5 and {*of_imagenet} < {*ImageNetInfo().label_descriptions()}
    timm.models.save_for_hf(make_model(num_classes=3), tmp_path / 'hub', {'label_names': ['Ant', 'Bee', 'Cow']})
    assert {*names('cat.jpg', '--model', tmp_path / 'hub')} == {'Ant', 'Bee', 'Cow'}


@pytest.mark.parametrize(['argv', 'line'], [
    (('nowhere.jpg', *USUAL[1:]), 'no such image or folder: nowhere.jpg'),
    (('text.png', *USUAL[1:]), r'1 of 1 image cannot be used: text.png \(cannot identify'),
    (('cat.jpg', 'folder', *USUAL[1:]), r'folder is a folder; pass the images in it: folder/\*'),
    ((*USUAL[:2], 'resnet18'), 'resnet18 is not a Mobile-Former; choose from mobileformer_26m'),
    ((*USUAL, '--class-map', 'cat.jpg'), 'cat.jpg is not in UTF-8'),
    ((*USUAL, '--output', 'tokens.xyz'), '--output tokens.xyz must end in one of .*png'),
    ((*USUAL, '--output', 'cat.jpg'), '--output would overwrite cat.jpg'),
])
def test_a_mistake_is_one_clear_line_and_nothing_is_written(run, work, argv, line):
    def contents():
        return {p: p.stat().st_mtime_ns for p in work.rglob('*')}
    before = contents()
    status, out, err = run(*argv)
    assert (status, out, err.count('\n')) == (2, '', 1)
    assert re.match('error: ' + line, err), err
    assert contents() == before


def test_the_picture_shows_every_map_red_where_the_attention_is(tmp_path):
    pytest.importorskip('matplotlib', reason="draws with matplotlib: pip install 'timm_mobileformer[demo]'")
    gather = torch.zeros(1, 2, 2, 4, 4)
    gather[:, :, 0, 1, 2] = gather[:, :, 1, 3, 0] = 1
    give = torch.full((1, 2, 2, 2, 2), 0.5)
    give[:, :, 0, 0, 1], give[:, :, 1, 0, 1] = 0.9, 0.1
    maps = [BridgeAttention('stages.1.0', gather, give), BridgeAttention('mobile_to_former', gather[:, :, :1], None)]
    figure = draw(torch.full((3, 8, 8), 0.5), maps, [('one', 0.9), ('two', 0.1)], 'a.png')
    pictures = [torch.from_numpy(ax.images[0].get_array()) for ax in figure.axes if ax.images]
    image, tokens_0, tokens_1, last, gives_0, gives_1 = pictures
    redness = [p[..., 0] - p[..., 2] for p in pictures[1:]]
    assert image.shape == (8, 8, 3)
    for r, (row, column) in zip(redness, [(1, 2), (3, 0), (1, 2)], strict=False):
        assert (r > 0.1).nonzero().tolist() == [[2 * row + i, 2 * column + j] for i in (0, 1) for j in (0, 1)]
        assert (r < -0.1).sum() == 60  # and blue everywhere else
    assert (redness[3] > 0.1)[:4, 4:].all() and redness[3].abs()[4:].amax() < 0.02
    assert (redness[4] < -0.1)[:4, 4:].all() and redness[4].abs()[:, :4].amax() < 0.02
    words = [t.get_text() for t in figure.texts]
    assert {'a.png', 'one', '90.0%', 'two', 'token 0', 'token 1', '1.0\n4×4', '1.0\n2×2', 'last\n4×4'} <= {*words}


def test_names_of_any_length_and_script_stay_in_their_place():
    pytest.importorskip('matplotlib', reason="draws with matplotlib: pip install 'timm_mobileformer[demo]'")
    maps = [BridgeAttention('mobile_to_former', torch.full((1, 2, 1, 4, 4), 1 / 16), None)]
    names = ['W' * 40, '咖啡' * 20, '$x', 'i' * 500, 'a \udcff b']
    figure = draw(torch.full((3, 8, 8), 0.5), maps, [(name, 0.1) for name in names], '咖' * 50)
    figure.draw_without_rendering()
    left = figure.axes[0].get_window_extent()
    probabilities = [t.get_window_extent() for t in figure.texts if t.get_text() == '10.0%']
    shown = [t for t in figure.texts if t.get_position()[0] == pytest.approx(0.2 / figure.get_figwidth())]
    assert len(shown) == 6 and {'$x', 'a ? b'} <= {t.get_text() for t in shown}
    for t in shown:
        is_title = t.get_text().startswith('咖咖')
        assert t.get_window_extent().x1 <= (left.x1 if is_title else min(box.x0 for box in probabilities))
