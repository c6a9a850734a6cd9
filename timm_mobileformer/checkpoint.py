"""Checkpoints in the authors' layout and in ours.

The authors' program (https://github.com/AAboys/MobileFormer) holds the same tensors under other names.
"""
import logging
from typing import Any, Dict, Iterable

import torch
import torch.nn as nn
from timm.models import clean_state_dict

__all__ = ['CheckpointMismatchError', 'checkpoint_filter_fn']

_logger = logging.getLogger(__name__)

# A part of ours and what the authors call it.
_MODEL = {
    'stem.conv': 'stem.0',
    'stem.bn': 'stem.1',
    'mobile_to_former.q': 'local_global.q',
    'mobile_to_former.gate': 'local_global.alpha.0',
    'mobile_to_former.proj': 'local_global.proj',
    'mobile_to_former.norm': 'local_global.layer_norm',
    'final_conv.conv': 'classifier.conv.1',
    'final_conv.bn': 'classifier.conv.2',
    'head_hidden.linear': 'classifier.fc.0',
    'head_hidden.bn': 'classifier.fc.1',
    'classifier': 'classifier.classifier.1',
}
# The same within `stages.S.B` of ours and `features.I` of theirs, which are counted through all stages.
_BLOCK = {
    # lite bottleneck
    'conv1.conv': 'conv.0',
    'conv1.bn': 'conv.1',
    'conv2.conv': 'conv.4',
    'conv2.bn': 'conv.5',
    # Mobile->Former
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
    # Mobile; the number of a dynamic ReLU is that of the convolution before it
    **{f'mobile.conv{i}.conv': f'conv{i}.0' for i in (1, 2, 3, 4)},
    **{f'mobile.conv{i}.bn': f'conv{i}.1' for i in (1, 2, 3, 4)},
    **{f'mobile.act{i}.fc1': f'hyper{i}.hyper.0' for i in (1, 2, 3)},
    **{f'mobile.act{i}.fc2': f'hyper{i}.hyper.2' for i in (1, 2, 3)},
    # Mobile<-Former
    'former_to_mobile.k': 'global_local.k',
    'former_to_mobile.v': 'global_local.proj',
}


class CheckpointMismatchError(RuntimeError):
    """A checkpoint does not fit the model."""


def _names_in(state: Iterable[str]) -> Dict[str, str]:
    """Our name of every tensor of the Mobile-Former in a model, and its name in the state dict of that model.

    The Mobile-Former may be compiled, or part of another module, as with `features_only` and DistributedDataParallel.

    Raises:
        TypeError: There is none in the model, or it is reparameterized.
    """
    names = {name.replace('_orig_mod.', ''): name for name in state}
    prefix = next((name.removesuffix('stem.bn.weight') for name in names if name.endswith('stem.bn.weight')), None)
    if prefix is None:
        raise TypeError('checkpoints are made to fit a Mobile-Former as create_model returns it, before '
                        'reparameterize_model; pass that model')
    return {name.removeprefix(prefix): full for name, full in names.items() if name.startswith(prefix)}


def _authors_names(keys: Iterable[str]) -> Dict[str, str]:
    """The authors' name of every tensor of ours, which come in the order of the network."""
    names: Dict[str, str] = {}
    blocks: Dict[str, int] = {}
    for key in keys:
        module, _, tensor = key.rpartition('.')
        if module.startswith('stages.'):
            _, stage, block, module = module.split('.', 3)
            index = blocks.setdefault(f'{stage}.{block}', len(blocks))
            names[key] = f'features.{index}.{_BLOCK[module]}.{tensor}'
        else:
            names[key] = f'{_MODEL[module]}.{tensor}' if module else 'tokens.weight'
    return names


def _name_some(names: Iterable[str], limit: int = 10) -> str:
    names = sorted(names)
    return ', '.join(names[:limit]) + (f' and {len(names) - limit} more' if len(names) > limit else '')


def checkpoint_filter_fn(
        state_dict: Dict[str, Any],
        model: nn.Module,
        strict: bool = True,
) -> Dict[str, torch.Tensor]:
    """Bring a checkpoint, the authors' or ours, into our layout, and refuse one that does not fit the model.

    Only the classifier and the channels of the images may differ, timm adapts those.

    Args:
        state_dict: Tensors by name, or a training checkpoint that holds them.
        model: The model to load, before `reparameterize_model`; it may be wrapped, compiled or part of another one.
        strict: Refuse missing and surplus tensors too; a warning names them otherwise. A model with `features_only`
            has no head, to which some tensors of a checkpoint belong.

    Returns:
        Tensors by their names in `model.state_dict()`.

    Raises:
        CheckpointMismatchError: Tensors are missing, surplus or of the wrong shape; the error names them as the
            checkpoint does.
        TypeError: The model is no Mobile-Former, or it is reparameterized.
    """
    for wrapper in ('state_dict_ema', 'model_ema', 'state_dict', 'model'):
        if isinstance(state_dict.get(wrapper), dict):
            state_dict = state_dict[wrapper]
            break
    state_dict = clean_state_dict(state_dict)
    state = model.state_dict()
    full_names = _names_in(state)
    target = {name: state[full] for name, full in full_names.items()}
    keys = [*target, 'classifier.weight', 'classifier.bias']  # a model without classifier may be given one with it
    names = _authors_names(keys) if 'tokens.weight' in state_dict else {key: key for key in keys}
    ours = {name: key for key, name in names.items()}
    out = {ours.get(name, name): tensor for name, tensor in state_dict.items()}

    problems = {
        'missing': [names[k] for k in target if k not in out],
        'surplus': [k for k in out if k not in names],
        'misshaped': [
            f'{names[k]} {tuple(out[k].shape)} instead of {tuple(v.shape)}' for k, v in target.items()
            if k in out and out[k].shape != v.shape and not k.startswith(('classifier.', 'stem.conv.'))
        ],
    }
    found = {kind: f'{kind}: {_name_some(names)}' for kind, names in problems.items() if names}
    message = f'The checkpoint does not fit {type(model).__name__}; ' + '; '.join(found.values())
    if strict and found or 'misshaped' in found:
        raise CheckpointMismatchError(message)
    if found:
        _logger.warning(message)
    prefix = full_names['stem.bn.weight'].removesuffix('stem.bn.weight')
    return {full_names.get(name, f'{prefix}{name}'): tensor for name, tensor in out.items()}
