"""Training, inference and recording on the device that TORCH_DEVICE names; on the CPU all that makes sense there.

    TORCH_DEVICE=cuda python -m pytest tests/test_parity.py tests/test_accelerator.py
"""
import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from device import DEVICE, needs_float64
from test_model import TINY, assert_close, images, three_blocks, tiny
from timm.utils import reparameterize_model
from torch.nn.parallel import DistributedDataParallel

asked_for = pytest.mark.skipif('TORCH_DEVICE' not in os.environ, reason='takes minutes; TORCH_DEVICE=cpu asks for it')
on_cuda = pytest.mark.skipif(DEVICE.type != 'cuda', reason='only CUDA has it; TORCH_DEVICE=cuda asks for it')


def batch(seed: int = 0) -> Any:
    return images(64, 64, 8, seed).to(DEVICE), (torch.arange(8) % 5).to(DEVICE)


def trainable() -> Any:
    return tiny(num_classes=5).to(DEVICE).train().requires_grad_()


def sgd(model: Any) -> Any:
    return torch.optim.SGD(model.parameters(), lr=0.01)


def step(model: Any, optimizer: Any, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), target)
    loss.backward()
    optimizer.step()
    return loss.detach()


@needs_float64
@pytest.mark.usefixtures('exact_hardswish')
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=['NCHW', 'channels_last'])
@pytest.mark.parametrize('form', [lambda m: m, reparameterize_model], ids=['as trained', 'reparameterized'])
@torch.no_grad()
def test_every_form_of_a_model_answers_as_the_plain_one_on_the_cpu(form, memory_format):
    model, x = tiny().double(), images().double()
    expected = model(x)
    moved = form(copy.deepcopy(model).to(DEVICE, memory_format=memory_format))
    assert_close(moved(x.to(DEVICE, memory_format=memory_format)).cpu(), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last], ids=['NCHW', 'channels_last'])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast_with_gradient_scaling_learns(dtype, memory_format):
    model = trainable().to(memory_format=memory_format)
    x, target = batch()
    x = x.contiguous(memory_format=memory_format)
    optimizer, scaler = sgd(model), torch.amp.GradScaler(DEVICE.type, init_scale=2.**10)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        with torch.autocast(DEVICE.type, dtype):
            loss = F.cross_entropy(model(x), target)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert scaler.get_scale() == 2.**10, 'a gradient was not finite'
    assert losses[-1] < losses[0] / 2


@asked_for
@needs_float64  # in TF32, BatchNorm makes too much of the rounding
@pytest.mark.usefixtures('exact_hardswish')
@pytest.mark.parametrize('training', [False, True], ids=['inference', 'training'])
def test_a_model_compiled_to_reduce_overhead_does_what_the_plain_one_does(training):
    torch._dynamo.reset()
    model = three_blocks().double().to(DEVICE).train(training).requires_grad_(training)
    x = images(32, 32).double().to(DEVICE)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, mode='reduce-overhead')
    for _ in range(3):  # first it compiles, then it records, then it replays
        with torch.set_grad_enabled(training):
            out, expected = compiled(x).clone(), model(x)
        assert_close(out, expected, rtol=1e-9, atol=1e-9)
        if training:
            for m, y in (compiled, out), (model, expected):
                m.zero_grad()
                y.square().mean().backward()
            assert_close([p.grad for p in compiled.parameters()], [p.grad for p in model.parameters()], 1e-9, 1e-9)


@on_cuda
@torch.no_grad()
def test_a_cuda_graph_replays_inference():
    model, x = tiny().to(DEVICE), images().to(DEVICE)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        model(x)
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        out = model(x)
    x.copy_(images(seed=1))
    graph.replay()
    assert_close(out, model(x), rtol=1e-3, atol=1e-3)


@on_cuda
def test_a_cuda_graph_replays_a_training_step():
    model, (x, target) = trainable(), batch()
    optimizer = sgd(model)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(model, optimizer, x, target)
    torch.cuda.current_stream().wait_stream(stream)
    optimizer.zero_grad()
    with torch.cuda.graph(graph):
        loss = step(model, optimizer, x, target)
    reference = copy.deepcopy(model)  # what is recorded has not been run
    x.copy_(batch(seed=1)[0])
    graph.replay()
    expected = step(reference, sgd(reference), x, target)
    assert_close(loss, expected, rtol=1e-3, atol=1e-3)
    assert_close(dict(model.state_dict()), dict(reference.state_dict()), rtol=1e-3, atol=1e-3)


@on_cuda
@pytest.mark.parametrize('form', [lambda m: m, reparameterize_model], ids=['as trained', 'reparameterized'])
def test_neither_inference_nor_training_waits_for_the_device(form):
    (x, target), inference, training = batch(), form(tiny().to(DEVICE)), trainable()
    optimizer = sgd(training)
    step(training, optimizer, x, target)  # what is made but once
    torch.cuda.set_sync_debug_mode('error')
    try:
        with torch.no_grad():
            inference(x)
        step(training, optimizer, x, target)
    finally:
        torch.cuda.set_sync_debug_mode('default')


def test_ddp_with_one_process_trains_as_the_plain_model_does(tmp_path):
    backend = dist.get_default_backend_for_device(DEVICE)  # NCCL of CUDA
    dist.init_process_group(backend, init_method=f'file://{tmp_path}/store', rank=0, world_size=1)
    try:
        plain, wrapped = trainable(), DistributedDataParallel(trainable())
        for model in plain, wrapped:
            optimizer = sgd(model)
            for seed in range(2):
                step(model, optimizer, *batch(seed))
        assert_close(dict(wrapped.module.state_dict()), dict(plain.state_dict()), rtol=1e-3, atol=1e-3)
    finally:
        dist.destroy_process_group()


@asked_for
def test_the_commands_run_there_and_on_what_was_trained_there(digits, tmp_path, monkeypatch, capsys):
    for package in 'sklearn', 'matplotlib', 'onnx', 'onnxscript', 'onnxruntime':
        pytest.importorskip(package, reason=f"pip install 'timm_mobileformer[demo,export]' brings {package}")
    pytest.importorskip('timm', '1.0.29', reason='the commands need timm 1.0.29')
    from timm_mobileformer.cli import main

    monkeypatch.chdir(tmp_path)
    assert not main(['finetune', '--data-dir', str(digits), '--model', TINY, '--epochs', '1', '--amp',
                     '--device', str(DEVICE)])
    assert f' on {DEVICE}; ' in capsys.readouterr().out
    assert not main(['export', 'onnx', '--data-dir', str(digits)])
    assert not main(['benchmark', '--model', TINY, '--runtimes', 'eager', '--rounds', '2', '--device', str(DEVICE)])
    model: Any = timm.create_model('local-dir:output/finetune', pretrained=True)
    assert model.num_classes == 10


def test_the_script_for_cuda_machines_measures_on_a_cpu_too():
    script = Path(__file__).with_name('measure_cuda.py')
    done = subprocess.run([sys.executable, script, '--no-tests', '--modes', 'eager', '--rounds', '2'], text=True,
                          capture_output=True, env={**os.environ, 'TORCH_DEVICE': 'cpu'})
    assert done.returncode == 0 and '–' not in done.stdout, done.stderr
    rows = [line.split('|')[2:-1] for line in done.stdout.splitlines() if line.startswith(('| latency', '| training'))]
    assert len(rows) == 12 and all(float(value.replace(',', '')) > 0 for row in rows for value in row)
