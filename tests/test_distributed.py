"""Two processes train as one does with the whole batch; a pair of processes over gloo runs all the checks below.

What must be equal is equal to rounding in float64. PyTorch's SyncBatchNorm refuses CPUs, so the pair gives it the same
arithmetic over gloo; everything else is PyTorch's and timm's own.
"""
import datetime
import traceback

import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import convert_sync_batchnorm
from timm.utils import ModelEmaV3
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.nn.functional import all_reduce
from torch.nn.parallel import DistributedDataParallel

import timm_mobileformer  # noqa: F401  registers the models

WORLD_SIZE = 2
STEPS = 2


def create(**kwargs):
    torch.manual_seed(0)
    return timm.create_model('test_mobileformer', **{'num_classes': 5, 'dtype': torch.float64, **kwargs})


def batches(dtype=torch.float64):
    """As many whole batches of 8 as there are steps."""
    generator = torch.Generator().manual_seed(1)
    return [(
        torch.randn(8, 3, 64, 64, generator=generator, dtype=torch.float64).to(dtype),
        torch.randint(5, (8,), generator=generator),
    ) for _ in range(STEPS)]


def train(model, forward=None, share=slice(None), amp=False, memory_format=torch.contiguous_format, ema=None):
    """Train a model on its share of every batch, through whatever wraps it."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-3)
    for images, labels in batches(next(model.parameters()).dtype):
        with torch.autocast('cpu', torch.bfloat16, enabled=amp):
            logits = (model if forward is None else forward)(images[share].contiguous(memory_format=memory_format))
        F.cross_entropy(logits.to(images.dtype), labels[share]).backward()
        optimizer.step()
        optimizer.zero_grad()
        if ema is not None:
            ema.update(model)


def mine(rank):
    return slice(rank, None, WORLD_SIZE)


def freeze(model):
    """BatchNorm uses the statistics that it has, so that no image depends on another one."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    return model


class GlooSyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """The arithmetic of SyncBatchNorm."""

    def forward(self, x):
        if not self.training:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        dims = [d for d in range(x.dim()) if d != 1]
        shape = [-1 if d == 1 else 1 for d in range(x.dim())]
        n = x.numel() // x.shape[1] * WORLD_SIZE
        mean = all_reduce(x.sum(dims)) / n
        centered = x - mean.view(shape)
        var = all_reduce(centered.square().sum(dims)) / n
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * (n / (n - 1)), self.momentum)
        return centered * (var + self.eps).rsqrt().view(shape) * self.weight.view(shape) + self.bias.view(shape)


def synchronise(model):
    """Convert every BatchNorm as timm's train.py does with --sync-bn."""
    model = convert_sync_batchnorm(model)
    assert not any(isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)) for m in model.modules())
    for module in model.modules():
        if isinstance(module, nn.SyncBatchNorm):
            module.__class__ = GlooSyncBatchNorm
    return model


def assert_equal(model, reference, rtol=1e-7, atol=1e-9):
    state = model if isinstance(model, dict) else model.state_dict()
    torch.testing.assert_close(dict(state), dict(reference.state_dict()), rtol=rtol, atol=atol)


def assert_moved(model):
    """A run that learned nothing would make everything above equal."""
    start = create().state_dict()
    assert not torch.allclose(model.state_dict()['tokens'].to(start['tokens']), start['tokens'], rtol=0, atol=1e-4)


# The checks, each run by both processes

def check_ddp_with_synchronised_batch_norm_and_ema(rank):
    reference = create()
    reference_ema = ModelEmaV3(reference, decay=0.5)
    train(reference, ema=reference_ema)
    model = synchronise(create())
    ema = ModelEmaV3(model, decay=0.5)
    train(model, DistributedDataParallel(model), mine(rank), ema=ema)
    assert_equal(model, reference)
    assert_equal(ema.module, reference_ema.module)
    assert_moved(reference_ema.module)


def check_ddp_with_gradient_checkpointing(rank):
    models = create(), synchronise(create())
    for model in models:
        model.set_grad_checkpointing()
    train(models[0])
    train(models[1], DistributedDataParallel(models[1]), mine(rank))
    assert_equal(models[1], models[0])


def check_ddp_with_channels_last(rank):
    reference = create()
    train(reference)
    model = synchronise(create()).to(memory_format=torch.channels_last)
    train(model, DistributedDataParallel(model), mine(rank), memory_format=torch.channels_last)
    assert_equal(model, reference)


def check_ddp_compiled(rank):
    reference, model = freeze(create()), freeze(create())
    train(reference)
    train(model, torch.compile(DistributedDataParallel(model), backend='eager'), mine(rank))
    assert_equal(model, reference)


def check_ddp_in_bfloat16_autocast(rank):
    reference, model, exact = (freeze(create(dtype=torch.float32)) for _ in range(3))
    train(exact)
    train(reference, amp=True)
    train(model, DistributedDataParallel(model), mine(rank), amp=True)
    start, expected, actual = (nn.utils.parameters_to_vector(m.parameters()) for m in (
        create(dtype=torch.float32), exact, model))
    gathered = [torch.empty_like(actual) for _ in range(WORLD_SIZE)]
    dist.all_gather(gathered, actual.detach())
    assert torch.equal(gathered[0], gathered[1])
    rounding = (nn.utils.parameters_to_vector(reference.parameters()) - expected).norm()
    assert (actual - expected).norm() < 1.5 * rounding < 0.5 * (expected - start).norm()


def check_ddp_with_gradient_accumulation(rank):
    reference, model = freeze(create()), freeze(create())
    train(reference)
    ddp = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-3)
    for images, labels in batches():
        first, second = (slice(2 * i + rank, 8, 4) for i in range(2))
        with ddp.no_sync():
            (F.cross_entropy(ddp(images[first]), labels[first]) / 2).backward()
        (F.cross_entropy(ddp(images[second]), labels[second]) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_equal(model, reference)


def check_ddp_of_feature_maps_uses_all_parameters(rank):
    model = DistributedDataParallel(create(features_only=True, out_indices=(2, 3, 4)))
    for images, _ in batches():  # the second forward raises if a parameter had no gradient
        sum(m.square().mean() for m in model(images[mine(rank)])).backward()


def shard(model, **kwargs):
    mesh = init_device_mesh('cpu', (WORLD_SIZE,))
    for stage in model.stages:
        for block in stage:
            fully_shard(block, mesh=mesh, **kwargs)
    return fully_shard(model, mesh=mesh, **kwargs)


def whole_state(model):
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=False))


def check_fsdp2_with_synchronised_batch_norm(rank):
    reference = create()
    train(reference)
    model = shard(synchronise(create()))
    train(model, share=mine(rank))
    state = whole_state(model)
    if rank == 0:  # where full_state_dict gathers it
        assert_equal(state, reference)
        create().load_state_dict(state)


def check_fsdp2_with_gradient_accumulation_and_checkpointing(rank):
    reference, model = freeze(create()), freeze(create())
    train(reference)
    model.set_grad_checkpointing()
    shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-3)
    for images, labels in batches():
        for i in range(2):
            part = slice(2 * i + rank, 8, 4)
            model.set_requires_gradient_sync(i == 1)
            (F.cross_entropy(model(images[part]), labels[part]) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    state = whole_state(model)
    if rank == 0:
        assert_equal(state, reference)


def check_fsdp2_from_meta_device(rank):
    model = shard(timm.create_model('test_mobileformer', num_classes=5, device='meta'))
    model.to_empty(device='cpu')
    model.init_weights()
    assert all(torch.isfinite(v.full_tensor() if hasattr(v, 'full_tensor') else v).all()
               for v in model.state_dict().values())
    assert model.tokens.full_tensor().std() > 0.5
    train(model, share=mine(rank))


def check_fsdp2_in_bfloat16_autocast(rank):
    reference, model = freeze(create(dtype=torch.float32)), freeze(create(dtype=torch.float32))
    train(reference)
    shard(model)
    train(model, share=mine(rank), amp=True)
    state = whole_state(model)
    if rank == 0:
        start = create(dtype=torch.float32).state_dict()
        for name, expected in reference.named_parameters():
            assert (state[name] - expected).norm() <= 0.2 * (expected - start[name]).norm() + 1e-6, name


CHECKS = {name.removeprefix('check_'): f for name, f in list(globals().items()) if name.startswith('check_')}


def run(rank, folder):
    """Run all checks until one fails, and leave what was raised, or '', for each that was run."""
    torch.set_num_threads(1)
    dist.init_process_group(
        'gloo', init_method=f'file://{folder}/store', rank=rank, world_size=WORLD_SIZE,
        timeout=datetime.timedelta(seconds=600))
    raised = {}
    try:
        for name, check in CHECKS.items():
            check(rank)
            raised[name] = ''
            dist.barrier()
    except Exception:
        raised[name] = traceback.format_exc()
    torch.save(raised, f'{folder}/{rank}.pt')
    dist.destroy_process_group()


@pytest.fixture(scope='module')
def raised(tmp_path_factory):
    folder = tmp_path_factory.mktemp('pair')
    torch.multiprocessing.spawn(run, (str(folder),), nprocs=WORLD_SIZE)
    return [torch.load(folder / f'{rank}.pt') for rank in range(WORLD_SIZE)]


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason='this PyTorch has no gloo')
@pytest.mark.parametrize('check', CHECKS)
def test_pair_of_processes(raised, check):
    for rank, r in enumerate(raised):
        assert check in r, 'not run, a check before it failed'
        assert not r[check], f'process {rank}: {r[check]}'


def test_sync_batch_norm_is_what_cpus_refuse(tmp_path):
    """Once this fails, the arithmetic over gloo above can go."""
    dist.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match='SyncBatchNorm expected input tensor to be on GPU'):
            convert_sync_batchnorm(create())(batches()[0][0])
    finally:
        dist.destroy_process_group()
