"""The model card of published weights."""
from typing import Any, Dict

from timm.models._hub import generate_readme

from timm_mobileformer.authors import AUTHORS_TAG, PAPER_TOP1

__all__ = ['model_card']


def model_card(model: Any, repo_id: str, origin: str) -> str:
    """Return the README.md of a Hub repository.

    Args:
        model: The model.
        repo_id: NAMESPACE/NAME of the repository.
        origin: Origin of the weights, in Markdown.
    """
    cfg = model.pretrained_cfg
    variant, paper = cfg['architecture'], 'https://arxiv.org/abs/2108.05895'
    is_authors = cfg['tag'] == AUTHORS_TAG
    what = f'{variant} is a Mobile-Former: a MobileNet and a transformer with a few global tokens in parallel, ' \
        'connected by a two-way bridge in every block. '
    if is_authors:
        what += 'These are the weights that the authors of the paper trained on ImageNet-1k and published, with ' \
            'parameters renamed for timm. The authors state no licence for them.'
    else:
        what += f'These weights (tag `{cfg["tag"]}`) are not those of the authors of the paper.'
    size = sum(p.numel() for p in model.parameters()) / 1e6
    height, width = cfg['input_size'][1:]
    details: Dict[str, Any] = {
        'Model Type': 'Image classification / feature backbone',
        'Model Stats': {'Params (M)': f'{size:.1f}', 'Image size': f'{height} x {width}', 'Classes': model.num_classes},
        'Papers': [f'{cfg["paper_name"]}: {paper}'],
    }
    if is_authors:
        details['Dataset'] = 'ImageNet-1k'
        details['Original'] = cfg['origin_url']
    details['Source'] = origin
    return generate_readme({
        'tags': ['image-classification', 'timm', 'mobile-former', f'arxiv:{paper.rsplit("/")[-1]}'],
        'license': cfg['license'],
        'description': what,
        'details': details,
        'usage': USAGE.format(repo_id=repo_id),
        'comparison': COMPARISON,
        'citation': CITATION,
    }, repo_id.split('/')[1])


USAGE = '''
`import timm_mobileformer` registers the model with timm.

### Image classification
```python
from PIL import Image
import timm
import timm_mobileformer
import torch

image = Image.open('image.jpg').convert('RGB')

model = timm.create_model('hf-hub:{repo_id}', pretrained=True).eval()
data_config = timm.data.resolve_model_data_config(model)
transform = timm.data.create_transform(**data_config, is_training=False)

logits = model(transform(image).unsqueeze(0))  # (1, classes)
probabilities, classes = logits.softmax(dim=1).topk(5)
```

### Feature maps
```python
from PIL import Image
import timm
import timm_mobileformer

image = Image.open('image.jpg').convert('RGB')

model = timm.create_model('hf-hub:{repo_id}', pretrained=True, features_only=True).eval()
data_config = timm.data.resolve_model_data_config(model)
transform = timm.data.create_transform(**data_config, is_training=False)

for x in model(transform(image).unsqueeze(0)):  # strides 2, 4, 8, 16 and 32
    print(x.shape)
```

### Image embeddings
```python
from PIL import Image
import timm
import timm_mobileformer

image = Image.open('image.jpg').convert('RGB')

model = timm.create_model('hf-hub:{repo_id}', pretrained=True, num_classes=0).eval()
data_config = timm.data.resolve_model_data_config(model)
transform = timm.data.create_transform(**data_config, is_training=False)

embedding = model(transform(image).unsqueeze(0))  # (1, head_hidden_size)
features = model.forward_features(transform(image).unsqueeze(0))  # (1, num_features, 7, 7) at 224 x 224
```
'''
COMPARISON = '''
Figures from the paper. FLOPs are multiply-adds; top-1 accuracy on ImageNet-1k in percent.

|model|params (M)|FLOPs (M)|top-1|
|---|---|---|---|
''' + ''.join(
    f'|{variant}|{params}|{variant.split("_")[1][:-1]}|{PAPER_TOP1[variant]}|\n'
    for variant, params in zip(PAPER_TOP1, (3.2, 3.5, 4.6, 7.6, 9.4, 11.4, 14.0), strict=True))
CITATION = '''@inproceedings{chen2022mobileformer,
  author={Chen, Yinpeng and Dai, Xiyang and Chen, Dongdong and Liu, Mengchen and Dong, Xiaoyi and Yuan, Lu and
          Liu, Zicheng},
  title={Mobile-Former: Bridging MobileNet and Transformer},
  booktitle={Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
  pages={5270--5279},
  year={2022}
}'''
