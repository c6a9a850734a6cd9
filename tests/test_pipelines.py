"""Libraries that know nothing of this package take a Mobile-Former: detectors, segmentation models, trainers."""
import os
import random
import subprocess
import sys

import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from test_model import THREE_BLOCKS
from timm.models._hub import save_for_hf
from timm.utils import reparameterize_model
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.ops import box_iou
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7
from torchvision.transforms.functional import to_tensor

from timm_mobileformer.detection import fpn_backbone
from timm_mobileformer.mobileformer import Mobile, MobileFormer


@pytest.fixture(scope='module')
def scenes(digits):
    """Four images with two digits each; of each digit its box and label, of each pixel its digit (10: none)."""
    rng = random.Random(0)
    images, targets, masks = [], [], []
    for _ in range(4):
        canvas, mask = Image.new('RGB', (96, 96)), Image.new('L', (96, 96), 10)
        boxes, labels = [], []
        for left, top in rng.sample([(0, 0), (0, 48), (48, 0), (48, 48)], 2):
            label, size = rng.randrange(10), rng.randint(32, 48)
            x, y = left + rng.randint(0, 48 - size), top + rng.randint(0, 48 - size)
            files = sorted((digits / 'train' / str(label)).iterdir())
            digit = Image.open(rng.choice(files)).resize((size, size))
            canvas.paste(digit, (x, y))
            mask.paste(label, (x, y), digit.point(lambda v: 255 * (v > 96)))
            boxes.append([x, y, x + size, y + size])
            labels.append(label)
        images.append(to_tensor(canvas))
        targets.append({'boxes': torch.tensor(boxes, dtype=torch.float32), 'labels': torch.tensor(labels)})
        masks.append((to_tensor(mask)[0] * 255).long())
    return torch.stack(images), targets, torch.stack(masks)


def fit(model, loss, steps, lr):
    """Train until the model should know its few images by heart."""
    optimizer = torch.optim.AdamW(model.parameters(), lr)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.2)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
        optimizer.step()
        scheduler.step()
    return model.eval()


# Detection

ON_96PX = dict(min_size=96, max_size=96, image_mean=[0.5] * 3, image_std=[0.5] * 3)


def retinanet():
    backbone = fpn_backbone('test_mobileformer', (2, 3, 4), LastLevelP6P7(64, 64), out_channels=64)
    return RetinaNet(backbone, num_classes=11, bg_iou_thresh=0.5, nms_thresh=0.3, **ON_96PX)  # no anchor is ignored


def faster_rcnn():
    backbone = fpn_backbone('test_mobileformer', (1, 2, 3, 4), LastLevelMaxPool(), out_channels=64)
    return FasterRCNN(
        backbone, num_classes=11, rpn_post_nms_top_n_train=100, rpn_post_nms_top_n_test=100,
        box_batch_size_per_image=32, **ON_96PX)


@pytest.mark.parametrize('create, steps', [(retinanet, 200), (faster_rcnn, 100)])
def test_detector_finds_its_digits_again(scenes, create, steps):
    images, targets, _ = scenes
    images = list(images)
    targets = [{'boxes': t['boxes'], 'labels': t['labels'] + 1} for t in targets]  # class 0 is the background
    torch.manual_seed(0)
    model = create()
    fit(model, lambda: sum(model(images, targets).values()), steps, lr=2e-3)
    with torch.no_grad():
        detections = model(images)
    for found, target in zip(detections, targets, strict=True):
        best = found['scores'].topk(len(target['labels'])).indices
        assert (found['scores'][best] > 0.5).all()
        right = box_iou(target['boxes'], found['boxes'][best]) > 0.5
        right &= target['labels'][:, None] == found['labels'][best]
        assert right.any(0).all() and right.any(1).all()


def test_pyramid_names_and_sizes():
    maps = fpn_backbone('test_mobileformer', (2, 3, 4), LastLevelP6P7(32, 32), 32, in_chans=1)(torch.rand(2, 1, 96, 70))
    assert {k: tuple(m.shape) for k, m in maps.items()} == {
        '0': (2, 32, 12, 9), '1': (2, 32, 6, 5), '2': (2, 32, 3, 3), 'p6': (2, 32, 2, 2), 'p7': (2, 32, 1, 1)}


# Segmentation

@pytest.mark.parametrize('arch, kwargs', [
    ('Unet', {}), ('FPN', {}), ('DeepLabV3Plus', {'encoder_output_stride': 16})], ids=['Unet', 'FPN', 'DeepLabV3Plus'])
def test_segmentation_models_pytorch(scenes, arch, kwargs):
    smp = pytest.importorskip('segmentation_models_pytorch', reason='segmentation-models-pytorch is not installed')
    images, _, masks = scenes
    torch.manual_seed(0)
    model = smp.create_model(arch, 'tu-test_mobileformer', encoder_weights=None, classes=11, **kwargs)
    fit(model, lambda: F.cross_entropy(model(images), masks), 80, lr=1e-2)
    with torch.no_grad():
        right = model(images).argmax(1) == masks
    assert right[masks < 10].float().mean() > 0.9, 'pixels of digits'
    assert right.float().mean() > 0.95


@pytest.mark.parametrize('arch', ['Unet', 'FPN', 'DeepLabV3Plus'])
def test_segmentation_models_pytorch_can_be_scripted(arch):
    smp = pytest.importorskip('segmentation_models_pytorch', reason='segmentation-models-pytorch is not installed')
    model = smp.create_model(arch, 'tu-test_mobileformer', encoder_weights=None, classes=3).eval()
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(torch.jit.script(model)(images), model(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('output_stride', [8, 16, 32])
def test_segmentation_models_pytorch_dilates_the_encoder(output_stride):
    smp = pytest.importorskip('segmentation_models_pytorch', reason='segmentation-models-pytorch is not installed')
    encoder = smp.encoders.get_encoder('tu-mobileformer_26m', weights=None, output_stride=output_stride).eval()
    with torch.no_grad():
        strides = [64 // m.shape[-1] for m in encoder(torch.rand(1, 3, 64, 64))]
    assert strides == [min(s, output_stride) for s in (1, 2, 4, 8, 16, 32)]


# Other users of timm

def test_transformers_classifies_with_a_saved_model(tmp_path):
    transformers = pytest.importorskip('transformers', reason='transformers is not installed')
    torch.manual_seed(0)
    model = timm.create_model('test_mobileformer', num_classes=10).eval()
    save_for_hf(model, tmp_path / 'timm', safe_serialization=True)
    images = torch.randn(2, 3, 160, 160)
    # transformers 5.24 and timm 1.0.31 both set num_classes, for every timm model, unless there are no model_args
    wrapped = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / 'timm', model_args={})
    wrapped.save_pretrained(tmp_path / 'transformers')
    again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / 'transformers')
    for m in wrapped, again:
        assert type(m.timm_model) is type(model)
        assert torch.equal(m.eval()(pixel_values=images).logits, model(images))
    maps = wrapped(pixel_values=images, output_hidden_states=True).hidden_states
    assert [m.shape[-1] for m in maps] == [80, 40, 20, 10, 5]
    pipeline = transformers.pipeline(
        'image-classification', model=wrapped,
        image_processor=transformers.AutoImageProcessor.from_pretrained(tmp_path / 'timm'))
    assert len(pipeline(Image.new('RGB', (200, 180)), top_k=10)) == 10


def test_transformers_trains_with_gradient_checkpointing(tmp_path):
    transformers = pytest.importorskip('transformers', reason='transformers is not installed')
    save_for_hf(timm.create_model('test_mobileformer', num_classes=10), tmp_path, safe_serialization=True)
    model = transformers.AutoModelForImageClassification.from_pretrained(
        tmp_path, model_args={}, num_labels=3, ignore_mismatched_sizes=True).train()
    model.gradient_checkpointing_enable()
    assert all(stage.grad_checkpointing for stage in model.timm_model.stages)
    model(pixel_values=torch.randn(2, 3, 64, 64), labels=torch.tensor([0, 2])).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


NARROW = dict(
    d_model=32, encoder_layers=1, decoder_layers=2, encoder_ffn_dim=32, decoder_ffn_dim=32, num_queries=5,
    encoder_attention_heads=8, decoder_attention_heads=8)


@pytest.mark.parametrize('name, out_indices, kwargs', [
    # those that take the timm model out of its TimmBackbone, whose checkpoints know nothing of how it was wrapped
    ('DetrForObjectDetection', [4], NARROW),
    ('DetrForSegmentation', [1, 2, 3, 4], NARROW),
    ('ConditionalDetrForObjectDetection', [4], NARROW),
    ('ConditionalDetrForSegmentation', [1, 2, 3, 4], NARROW),
    ('TableTransformerForObjectDetection', [4], NARROW),
    ('DeformableDetrForObjectDetection', [2, 3, 4], NARROW),
    # one that leaves it there
    ('UperNetForSemanticSegmentation', [1, 2, 3, 4], dict(hidden_size=32, use_auxiliary_head=False)),
])
def test_transformers_loads_the_detectors_and_segmenters_that_it_saved(name, out_indices, kwargs, tmp_path):
    transformers = pytest.importorskip('transformers', reason='transformers is not installed')
    torch.manual_seed(0)
    backbone = transformers.TimmBackboneConfig(
        backbone='test_mobileformer', out_indices=out_indices, features_only=True)
    model_class = getattr(transformers, name)
    model = model_class(model_class.config_class(backbone_config=backbone, **kwargs)).eval()
    model.save_pretrained(tmp_path)
    again, info = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        answers, expected = again.eval()(pixel_values=images).logits, model(pixel_values=images).logits
    torch.testing.assert_close(answers, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize('include_buffers', [False, True])
@pytest.mark.parametrize('device_map', [
    {'': 'cpu'}, {'tokens': 'cpu', 'stem': 'cpu', 'stages': 'disk', 'mobile_to_former': 'cpu', 'final_conv': 'disk',
                  'head_hidden': 'cpu', 'classifier': 'disk'}], ids=['in memory', 'on disk'])
def test_accelerate_fills_an_empty_model_from_a_checkpoint(device_map, include_buffers, tmp_path):
    accelerate = pytest.importorskip('accelerate', reason='accelerate is not installed')
    torch.manual_seed(0)
    model = timm.create_model('test_mobileformer').eval()
    checkpoint = str(tmp_path / 'model.safetensors')
    save_file(model.state_dict(), checkpoint, metadata={'format': 'pt'})
    with accelerate.init_empty_weights(include_buffers=include_buffers):
        empty = timm.create_model('test_mobileformer').eval()
    filled = accelerate.load_checkpoint_and_dispatch(
        empty, checkpoint, device_map, offload_folder=tmp_path / 'offloaded', offload_buffers=include_buffers)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(filled(images), model(images))


def test_fastai_learns_the_digits(digits):
    vision = pytest.importorskip('fastai.vision.all', reason='fastai is not installed')
    loaders = vision.ImageDataLoaders.from_folder(
        digits, train='train', valid='validation', item_tfms=vision.Resize(32), bs=32, num_workers=0, seed=0)
    learner = vision.vision_learner(loaders, 'test_mobileformer', pretrained=False, metrics=vision.accuracy)
    learner.unfreeze()
    with learner.no_bar(), learner.no_logging():
        learner.fit_one_cycle(4, 5e-3)
    assert learner.validate()[1] > 0.8


def test_anomalib_extracts_features_by_the_names_of_the_stages():
    extractor = pytest.importorskip(
        'anomalib.models.components.feature_extractors', reason='anomalib is not installed').TimmFeatureExtractor
    maps = extractor('test_mobileformer', layers=['stages.1', 'stages.2'], pre_trained=False)(torch.rand(1, 3, 64, 64))
    assert {k: tuple(m.shape) for k, m in maps.items()} == {'stages.1': (1, 8, 16, 16), 'stages.2': (1, 16, 8, 8)}


# Adapters and quantizers, which replace or rewrite linear layers

def test_peft_adapts_every_linear_layer_and_merges():
    peft = pytest.importorskip('peft', reason='peft is not installed')
    torch.manual_seed(0)
    model = timm.create_model('test_mobileformer', num_classes=10)
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    config = peft.LoraConfig(r=2, target_modules='all-linear', modules_to_save=['classifier'], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).train()
    images = torch.randn(4, 3, 64, 64)
    F.cross_entropy(adapted(images), torch.arange(4)).backward()
    learnt = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert {name for name, p in adapted.named_parameters() if p.grad is not None} == learnt
    assert all(any(f'.{name}.lora_A' in n for n in learnt) for name in linear - {'classifier'})
    expected = adapted.eval()(images)
    merged = adapted.merge_and_unload()
    assert type(merged) is type(model)
    torch.testing.assert_close(reparameterize_model(merged)(images), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('fused', [False, True], ids=['as trained', 'reparameterized'])
def test_torchao_quantizes_the_linear_layers(fused):
    quantization = pytest.importorskip('torchao.quantization', reason='torchao is not installed')
    torch.manual_seed(0)
    model = timm.create_model('test_mobileformer', num_classes=10).eval()
    if fused:
        model = reparameterize_model(model)
    images = torch.randn(2, 3, 64, 64)
    expected = model(images)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    assert all(m.weight.qdata.dtype == torch.int8 for m in model.modules() if isinstance(m, torch.nn.Linear))
    answers = model(images)
    assert not torch.equal(answers, expected)
    assert (answers - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize('dynamo', [False, True], ids=['torchscript', 'dynamo'])
def test_nncf_quantizes_the_exported_graph(dynamo, tmp_path):
    nncf = pytest.importorskip('nncf', reason='nncf is not installed')
    onnx = pytest.importorskip('onnx', reason='onnx is not installed')
    model = reparameterize_model(MobileFormer(8, 2, 32, THREE_BLOCKS, 32).eval())
    torch.onnx.export(model, (torch.randn(1, 3, 64, 64),), tmp_path / 'model.onnx', dynamo=dynamo)
    graph = onnx.load(tmp_path / 'model.onnx')
    examples = nncf.Dataset([{graph.graph.input[0].name: torch.randn(1, 3, 64, 64).numpy()}])
    nodes = nncf.quantize(graph, examples, fast_bias_correction=True).graph.node
    made_by = {name: node.op_type for node in nodes for name in node.output}
    convolutions = [node for node in nodes if node.op_type == 'Conv']
    assert len(convolutions) == sum(isinstance(m, torch.nn.Conv2d) for m in model.modules())
    assert all(made_by[node.input[1]] == 'DequantizeLinear' for node in convolutions)


def test_torch_pruning_takes_a_quarter_of_the_hidden_channels():
    pruning = pytest.importorskip('torch_pruning', reason='torch-pruning is not installed')
    torch.manual_seed(0)
    model, images = timm.create_model('test_mobileformer', num_classes=10).eval(), torch.randn(2, 3, 64, 64)
    blocks = [m for m in model.modules() if isinstance(m, Mobile)]
    widths = [block.conv1.conv.out_channels for block in blocks]
    for block in blocks:  # numbers that name the channels
        block.conv1.bn.weight.data = torch.arange(1., 1 + len(block.conv1.bn.weight))
        block.act1.fc2.bias.data = torch.arange(1., 1 + len(block.conv1.bn.weight)).repeat(2)
    hidden = {conv for block in blocks for conv in (block.conv1.conv, block.conv2.conv)}
    others = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d) and m not in hidden]
    pruning.pruner.MagnitudePruner(
        model, images, pruning.importance.MagnitudeImportance(), pruning_ratio=0.25,
        root_module_types=[torch.nn.Conv2d], ignored_layers=others).step()
    assert [block.conv1.conv.out_channels for block in blocks] == [width * 3 // 4 for width in widths]
    for block in blocks:
        assert torch.equal(block.act1.fc2.bias, block.conv1.bn.weight.repeat(2)), 'slopes of other channels'
    model.train()(images).sum().backward()
    torch.testing.assert_close(reparameterize_model(model.eval())(images), model(images), rtol=1e-3, atol=1e-4)


# Trainers that pin older versions, each in an environment of its own; see docs/versions.md

AUTOGLUON = """
import sys
import pandas
from autogluon.multimodal import MultiModalPredictor
from pathlib import Path

files = [path for label in '01' for path in sorted(Path(sys.argv[1], 'train', label).iterdir())[:32]]
frame = pandas.DataFrame({'image': map(str, files), 'label': [path.parent.name for path in files]})
predictor = MultiModalPredictor(label='label', path='predictor').fit(frame, tuning_data=frame, hyperparameters={
    'model.names': ['timm_image'], 'model.timm_image.checkpoint_name': 'mobileformer_52m', 'optim.max_epochs': 1,
    'env.batch_size': 32, 'env.per_gpu_batch_size': 32, 'env.num_workers': 0, 'env.num_workers_inference': 0})
answers = predictor.predict(frame)
assert set(answers) <= {'0', '1'} and answers.equals(MultiModalPredictor.load('predictor').predict(frame))
print(type(predictor._learner._model.model))
"""


LIGHTNING = """
import lightning, timm, torch

class Classifier(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = timm.create_model('test_mobileformer', num_classes=2)

    def training_step(self, batch, index):
        return torch.nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-3)

data = torch.utils.data.TensorDataset(torch.randn(16, 3, 64, 64), torch.arange(16) % 2)
task = Classifier()
trainer = lightning.Trainer(accelerator='cpu', devices=2, strategy='ddp', max_epochs=1, logger=False,
                            enable_checkpointing=False, enable_progress_bar=False)
trainer.fit(task, torch.utils.data.DataLoader(data, 4))
weights = torch.cat([p.detach().flatten() for p in task.model.parameters()])
everywhere = task.all_gather(weights)
assert torch.equal(everywhere[0], everywhere[1]) and weights.isfinite().all()
print(trainer.world_size, 'processes')
"""

LIGHTLY = """
import sys
import lightly_train, timm, torch

model = timm.create_model('mobileformer_52m')
model.prune_intermediate_layers()
model.reset_classifier(0, 'avg')
before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
lightly_train.train(out='out', data=sys.argv[1], model=model, method='simclr', epochs=1, batch_size=16, num_workers=0,
                    accelerator='cpu', devices=1, transform_args={'image_size': (64, 64)})
timm.create_model('mobileformer_52m').load_state_dict(torch.load('out/exported_models/exported_last.pt'), strict=False)
assert all(not torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
print('trained')
"""


@pytest.mark.parametrize('package, script, printed', [
    ('lightning', LIGHTNING, '2 processes'), ('lightly_train', LIGHTLY, 'trained')])
def test_trainers_train_in_processes_of_their_own(package, script, printed, digits, tmp_path):
    pytest.importorskip(package, reason=f'{package} is not installed')
    (tmp_path / 'script.py').write_text(script)
    done = subprocess.run([sys.executable, 'script.py', digits / 'train' / '0'], cwd=tmp_path, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    assert printed in done.stdout


def test_open_clip_takes_the_image_tower():
    open_clip = pytest.importorskip('open_clip', reason='open_clip_torch is not installed')
    vision = dict(timm_model_name='test_mobileformer', timm_pool='avg', timm_proj=None, image_size=64)
    text = dict(context_length=8, vocab_size=100, width=32, heads=2, layers=1)
    model = open_clip.model.CLIP(embed_dim=64, vision_cfg=vision, text_cfg=text)
    open_clip.ClipLoss()(*model(torch.randn(4, 3, 64, 64), torch.randint(1, 99, (4, 8)))).backward()
    assert isinstance(model.visual.trunk, MobileFormer)
    assert all(p.grad is not None for p in model.visual.parameters())


def test_torchgeo_trains_on_more_than_three_channels():
    trainers = pytest.importorskip('torchgeo.trainers', reason='torchgeo is not installed')
    task = trainers.ClassificationTask(model='test_mobileformer', weights=None, in_channels=4, num_classes=3)
    task.training_step({'image': torch.randn(2, 4, 64, 64), 'label': torch.tensor([0, 2])}, 0).backward()
    assert isinstance(task.model, MobileFormer) and task.model.stem.conv.weight.grad.shape[1] == 4


def test_autogluon_trains_by_name_from_published_weights(digits, hub, tmp_path):
    pytest.importorskip('autogluon.multimodal', reason='autogluon.multimodal is not installed')
    repo = 'autogluon/mobileformer_52m.ms_in1k'
    save_for_hf(timm.create_model('mobileformer_52m'), tmp_path / 'weights', safe_serialization=True)
    hub.create(repo)
    hub.commit(repo, 'main', {
        path.name: hub.keep(repo, path.read_bytes(), lfs=True) for path in (tmp_path / 'weights').iterdir()}, 'weights')
    env = {**os.environ, 'TIMM_MOBILEFORMER_HUB': 'autogluon', 'HF_ENDPOINT': hub.endpoint, 'HF_HUB_DISABLE_XET': '1',
           'HF_HOME': str(tmp_path / 'home')}
    done = subprocess.run(
        [sys.executable, '-c', AUTOGLUON, digits], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 'timm_mobileformer.mobileformer.MobileFormer' in done.stdout


# Converters for phones

@pytest.mark.parametrize('name', ['test_mobileformer', 'mobileformer_26m'])
def test_core_ml_takes_the_exported_program(name):
    coremltools = pytest.importorskip('coremltools', reason='coremltools is not installed')
    model = reparameterize_model(timm.create_model(name, num_classes=10).eval())
    program = torch.export.export(model, (torch.randn(1, 3, 64, 64),)).run_decompositions({})
    package = coremltools.convert(
        program, minimum_deployment_target=coremltools.target.iOS16, skip_model_load=True)  # which only a Mac can
    output, = package.get_spec().description.output
    assert tuple(output.type.multiArrayType.shape) == (1, 10)


@pytest.mark.parametrize('name', ['test_mobileformer', 'mobileformer_26m'])
def test_litert_computes_the_same(name):
    litert_torch = pytest.importorskip('litert_torch', reason='litert-torch is not installed')
    torch.manual_seed(0)
    model = reparameterize_model(timm.create_model(name, num_classes=10).eval())
    images = torch.randn(1, 3, 64, 64)
    answers = litert_torch.convert(model, (images,))(images.numpy())
    torch.testing.assert_close(torch.from_numpy(answers), model(images).detach(), rtol=1e-3, atol=1e-5)
