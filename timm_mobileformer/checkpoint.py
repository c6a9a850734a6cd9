"""Conversion of checkpoints from the authors' parameter names to ours.

The authors' implementation (https://github.com/AAboys/MobileFormer) has the same tensors under different names.
"""
import logging
from typing import Any, Dict, Iterable

import torch
import torch.nn as nn
from timm.models import clean_state_dict

__all__ = ['CheckpointMismatchError', 'checkpoint_filter_fn']

_logger = logging.getLogger(__name__)

# Module names: ours -> the authors'. Those of blocks follow `stages.S.B.` in our names and `features.I.` in theirs,
# which are numbered across all stages.
_MODULES = {
    'stem.conv': 'stem.0',
    'stem.bn': 'stem.1',
    # lite bottleneck
    'conv1.conv': 'conv.0',
    'conv1.bn': 'conv.1',
    'conv2.conv': 'conv.4',
    'conv2.bn': 'conv.5',
    # Mobile->Former, in blocks and after them
    'mobile_to_former.q': 'local_global.q',
    'mobile_to_former.gate': 'local_global.alpha.0',
    'mobile_to_former.proj': 'local_global.proj',
    'mobile_to_former.norm': 'local_global.layer_norm',
    # Former
    'former.q': 'global_block.q',
    'former.proj': 'global_block.channel_mlp',
    'former.norm1': 'global_block.layer_norm',
    'former.fc1': 'global_block.ffn.0',
    'former.fc2': 'global_block.ffn.2',
    'former.norm2': 'global_block.ffn_norm',
    # Mobile; a dynamic ReLU is numbered like the preceding convolution
    **{f'mobile.conv{i}.conv': f'conv{i}.0' for i in (1, 2, 3, 4)},
    **{f'mobile.conv{i}.bn': f'conv{i}.1' for i in (1, 2, 3, 4)},
    **{f'mobile.act{i}.fc1': f'hyper{i}.hyper.0' for i in (1, 2, 3)},
    **{f'mobile.act{i}.fc2': f'hyper{i}.hyper.2' for i in (1, 2, 3)},
    # Mobile<-Former
    'former_to_mobile.k': 'global_local.k',
    'former_to_mobile.v': 'global_local.proj',
    # head
    'final_conv.conv': 'classifier.conv.1',
    'final_conv.bn': 'classifier.conv.2',
    'head_hidden.linear': 'classifier.fc.0',
    'head_hidden.bn': 'classifier.fc.1',
    'classifier': 'classifier.classifier.1',
}


class CheckpointMismatchError(RuntimeError):
    """A checkpoint does not fit the model."""


def _names_in(state: Iterable[str]) -> Dict[str, str]:
    """Map our tensor names to those in the state dict of a model that is, or contains, a Mobile-Former.

    The Mobile-Former may be compiled, or part of another module, as with `features_only` and DistributedDataParallel.

    Raises:
        TypeError: The model contains no Mobile-Former, or it is reparameterized.
    """
    names = {name.replace('_orig_mod.', ''): name for name in state}
    prefix = next((name.removesuffix('stem.bn.weight') for name in names if name.endswith('stem.bn.weight')), None)
    if prefix is None:
        raise TypeError('a checkpoint can only be converted for a Mobile-Former as create_model returns it, before '
                        'reparameterize_model; pass that model')
    return {name.removeprefix(prefix): full for name, full in names.items() if name.startswith(prefix)}


def _authors_names(keys: Iterable[str]) -> Dict[str, str]:
    """Map our tensor names, given in network order, to the authors'."""
    names: Dict[str, str] = {}
    blocks: Dict[str, int] = {}
    for key in keys:
        module, _, tensor = key.rpartition('.')
        if module.startswith('stages.'):
            _, stage, block, module = module.split('.', 3)
            index = blocks.setdefault(f'{stage}.{block}', len(blocks))
            names[key] = f'features.{index}.{_MODULES[module]}.{tensor}'
        else:
            names[key] = f'{_MODULES[module]}.{tensor}' if module else 'tokens.weight'
    return names


def _name_some(names: Iterable[str]) -> str:
    names = sorted(names)
    return ', '.join(names[:10]) + (f' and {len(names) - 10} more' if len(names) > 10 else '')


def checkpoint_filter_fn(
        state_dict: Dict[str, Any],
        model: nn.Module,
        strict: bool = True,
) -> Dict[str, torch.Tensor]:
    """Convert a checkpoint to our parameter names and check that it matches the model.

    Checkpoints with the authors' parameter names and with ours are accepted. The numbers of classes and of input
    channels may differ; timm adapts them.

    Args:
        state_dict: State dict, or a training checkpoint that contains one.
        model: Model to load the checkpoint into, before `reparameterize_model`; it may be wrapped, compiled or part of
            another model.
        strict: Raise an error for missing and unexpected tensors, too, instead of logging a warning. Use False for a
            model with `features_only`, which has no head.

    Returns:
        The state dict with the names of `model.state_dict()`.

    Raises:
        CheckpointMismatchError: Tensors are missing, unexpected or have the wrong shape. The error lists them by their
            names in the checkpoint.
        TypeError: The model is not a Mobile-Former, or it is reparameterized.
    """
    for wrapper in ('state_dict_ema', 'model_ema', 'state_dict', 'model'):
        if isinstance(state_dict.get(wrapper), dict):
            state_dict = state_dict[wrapper]
            break
    state_dict = clean_state_dict(state_dict)
    state = model.state_dict()
    full_names = _names_in(state)
    target = {name: state[full] for name, full in full_names.items()}
    keys = [*target, 'classifier.weight', 'classifier.bias']  # also accepted by a model without one
    names = _authors_names(keys) if 'tokens.weight' in state_dict else {key: key for key in keys}
    ours = {name: key for key, name in names.items()}
    out = {ours.get(name, name): tensor for name, tensor in state_dict.items()}

    problems = {
        'missing': [names[k] for k in target if k not in out],
        'unexpected': [k for k in out if k not in names],
        'size mismatch': [
            f'{names[k]} {tuple(out[k].shape)} instead of {tuple(v.shape)}' for k, v in target.items()
            if k in out and out[k].shape != v.shape and not k.startswith(('classifier.', 'stem.conv.'))
        ],
    }
    found = {kind: f'{kind}: {_name_some(names)}' for kind, names in problems.items() if names}
    message = f'The checkpoint does not fit {type(model).__name__}; ' + '; '.join(found.values())
    if strict and found or 'size mismatch' in found:
        raise CheckpointMismatchError(message)
    if found:
        _logger.warning(message)
    prefix = full_names['stem.bn.weight'].removesuffix('stem.bn.weight')
    return {full_names.get(name, f'{prefix}{name}'): tensor for name, tensor in out.items()}
