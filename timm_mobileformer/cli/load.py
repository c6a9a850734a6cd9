"""Load models, weights and class names from command-line options."""
import argparse
import difflib
import os
import pickle
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import timm
import torch
from safetensors.torch import load_file
from timm.data import (
    CustomDatasetInfo,
    DatasetInfoLabelMapper,
    ImageNetInfo,
    infer_imagenet_subset,
    resolve_model_data_config,
)
from timm.models import get_arch_name, is_model_in_modules, parse_model_name, resolve_pretrained_cfg
from timm.models._hub import load_model_config_from_hf, load_model_config_from_path

from timm_mobileformer import MobileFormer, checkpoint_filter_fn
from timm_mobileformer.download_errors import why

from .console import InputError, plural, quote, reason

__all__ = [
    'HAVE_WEIGHTS', 'class_names', 'find_model', 'known_config', 'load_mobileformer', 'load_model', 'model_args',
    'model_data_config', 'pick_device', 'read_checkpoint', 'read_names', 'reading_options', 'set_data_config',
    'set_white_level']

HAVE_WEIGHTS = 'hf-hub:', 'local-dir:'
MODES = {1: 'L', 3: 'RGB'}  # Pillow modes by number of channels
WHITE_LEVEL = 'white_level='  # prefix of a note in `pretrained_cfg`, since timm restricts its fields


def pick_device(args: argparse.Namespace) -> torch.device:
    """Return the device of `--device`, by default the accelerator that PyTorch finds, else the CPU."""
    found: Any = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else 'cpu'
    try:
        device = torch.device(args.device or found)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as e:
        raise InputError(f'--device {args.device}: {reason(e)}') from e
    if device.type == 'meta':
        raise InputError('--device meta holds shapes without values, nothing can be computed there')
    return device


def read_checkpoint(path: Path, use_ema: bool = False) -> Tuple[Dict[str, torch.Tensor], Dict[str, Any]]:
    """Read a checkpoint as data; no code in it is executed.

    Args:
        path: Checkpoint of train.py, of finetune or of the authors, state dict, or safetensors file.
        use_ema: Return the averaged weights.

    Returns:
        The tensors by name, and the training options if the checkpoint has them.

    Raises:
        InputError: The file is damaged or not a checkpoint.
    """
    content: Any
    try:
        if path.suffix == '.safetensors':
            content = load_file(path)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):  # timm's train.py keeps its arguments
                content = torch.load(path, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError as e:
        raise InputError(f'{path} is refused: it is not a checkpoint, or loading it would execute code') from e
    except Exception as e:  # readers raise many types of errors for damaged files
        raise InputError(f'{path} cannot be read: the file is damaged or not a checkpoint ({reason(e, 200)})') from e
    content = content if isinstance(content, dict) else {}
    wrapped = [key for key in (('state_dict_ema', 'model_ema') if use_ema else ('state_dict', 'model'))
               if isinstance(content.get(key), dict)]
    if use_ema and not wrapped:
        raise InputError(f'{path} has no averaged weights; omit --use-ema')
    tensors = content[wrapped[0]] if wrapped else content
    if not tensors or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
        raise InputError(f'{path} is not a checkpoint: it has no named tensors')
    options = content.get('args') if wrapped else None
    return tensors, options if isinstance(options, dict) else vars(options) if options else {}


def find_model(name: str) -> str:
    """Return the name by which timm creates the model of `--model`.

    Raises:
        InputError: There is no such model.
    """
    if name.startswith(HAVE_WEIGHTS) or timm.is_model(name):  # model names take precedence over folders; use ./NAME
        return name
    folder = Path(name)
    if (folder / 'config.json').is_file():
        return f'local-dir:{name}'
    if folder.is_dir():
        raise InputError(f'{name} has no config.json, so finetune did not write it; for a folder of train.py, use '
                         f'--model ARCHITECTURE --checkpoint {quote(folder / "model_best.pth.tar")}')
    if os.sep in name:
        raise InputError(f'no such folder: {name}; train a model with finetune, or name a model of timm')
    similar = difflib.get_close_matches(name, timm.list_models())
    hint = f'similar: {", ".join(similar)}' if similar else 'use a model of timm, a folder of finetune, or hf-hub:…'
    raise InputError(f'{name} is neither a model of timm nor a folder; {hint}')


def known_config(name: str) -> Tuple[Dict[str, Any], Dict[str, Any]]:
    """Return the pretrained config of a model and the arguments that it was saved with, without creating it."""
    source, location = parse_model_name(name)
    if not source:
        return resolve_pretrained_cfg(name).to_dict(), {}
    read: Any = load_model_config_from_hf if source == 'hf-hub' else load_model_config_from_path
    cfg, _, kwargs = read(location)
    return cfg, kwargs or {}


def model_args(name: str, options: Dict[str, Any]) -> Dict[str, Any]:
    """Return the arguments that a model was saved with, and its `img_size` if it is built for a fixed size."""
    cfg, kwargs = known_config(name)
    size = tuple(options['input_size'][1:]) if options.get('input_size') else options.get('img_size')
    return {**kwargs, 'img_size': size} if size and (cfg.get('fixed_input_size') or 'img_size' in kwargs) else kwargs


def count_classes(name: str, tensors: Dict[str, torch.Tensor]) -> int:
    """Return the number of classes of a state dict, 0 if it has no classifier."""
    if is_model_in_modules(name, ['mobileformer']):  # the authors' parameter names differ
        tensors = checkpoint_filter_fn(tensors, timm.create_model(name, num_classes=0, device='meta'))
    cfg: Any = timm.models.get_pretrained_cfg(name)
    classifier = cfg.classifier if isinstance(cfg.classifier, str) else (cfg.classifier or [''])[0]
    return len(tensors.get(f'{classifier}.weight', ()))


def model_data_config(model: Any, options: Dict[str, Any]) -> Dict[str, Any]:
    """Return timm's `resolve_model_data_config` for the channels of the model; timm assumes 3 with `--img-size`."""
    return resolve_model_data_config(model, {**options, 'in_chans': model.pretrained_cfg['input_size'][0]})


def set_data_config(model: Any, options: Dict[str, Any]) -> Dict[str, Any]:
    """Store the preprocessing that the options describe in a model's `pretrained_cfg`, and return it."""
    cfg, data_config = model.pretrained_cfg, model_data_config(model, options)
    if data_config['input_size'] != tuple(cfg['input_size']):
        cfg['pool_size'] = None
    cfg.update(data_config)
    return data_config


def set_white_level(model: Any, white_level: Optional[int]) -> None:
    """Store the white level of 16-bit grayscale training images in `pretrained_cfg`; None if there were none."""
    cfg = model.pretrained_cfg
    notes = [note for note in cfg.get('notes') or () if not note.startswith(WHITE_LEVEL)]
    cfg['notes'] = [*notes, f'{WHITE_LEVEL}{white_level}'] if white_level else notes or None


def reading_options(model: Any) -> Dict[str, Any]:
    """Return the arguments of `images.read_image` for a model."""
    cfg = model.pretrained_cfg
    notes = [note for note in cfg.get('notes') or () if note.startswith(WHITE_LEVEL)]
    white_level = int(notes[0].removeprefix(WHITE_LEVEL)) if notes else None
    return {'mode': MODES[cfg['input_size'][0]], 'white_level': white_level}


def what_failed(args: argparse.Namespace, error: Exception, file: Optional[Path]) -> str:
    """Return why a model could not be created and what to do, in terms of the command line."""
    if file:
        return f'{file} as {args.model}: {reason(error)}'
    if args.model.startswith('hf-hub:'):
        return f'{args.model}: {why(error)}'
    return f'{args.model}: {reason(error, 2000).removeprefix(f"{args.model}: ")}'


def load_model(
        args: argparse.Namespace,
        num_classes: Optional[int] = None,
        resumed: Optional[Dict[str, Any]] = None,
        **kwargs: Any,
) -> Any:
    """Create the model of `--model`, `--checkpoint`, `--pretrained`, `--use-ema` and `--img-size`.

    Its `pretrained_cfg` holds the preprocessing of its training if known, else the default of timm.

    Args:
        args: Command-line options.
        num_classes: Number of classes; a model without weights is then initialized at random. By default, the number
            of classes of the weights, which are required then.
        resumed: Preprocessing of a run to resume, for which no weights are loaded here.
        **kwargs: Further arguments of `timm.create_model`.

    Raises:
        InputError: There is no such model, it has no weights, or they do not fit.
    """
    if args.use_ema and not args.checkpoint:
        raise InputError('--use-ema needs a checkpoint with averaged weights: --checkpoint FILE')
    name, file = find_model(args.model), args.checkpoint if resumed is None else None
    has_own = name.startswith(HAVE_WEIGHTS)
    if file and has_own:
        raise InputError(f'{args.model} has weights already; --checkpoint needs a model name of timm')
    loads = resumed is None and bool(file or has_own or args.pretrained)
    if num_classes is None and not loads:
        raise InputError(f'{args.model} needs weights: --checkpoint FILE for your own, --pretrained for those of timm')
    tensors, trained = read_checkpoint(file, args.use_ema) if file else ({}, resumed or {})
    if args.img_size:
        trained = {**trained, 'input_size': None, 'img_size': args.img_size}
    overlay: Any = {}
    try:
        if file:
            kwargs['num_classes'] = count_classes(name, tensors)
            overlay = dict(state_dict=tensors, num_classes=kwargs['num_classes'], label_offset=0)
        elif not loads:
            kwargs['num_classes'] = num_classes
        model: Any = timm.create_model(
            name, pretrained=loads, pretrained_cfg_overlay=overlay, **{**model_args(name, trained), **kwargs})
    except Exception as e:  # files, downloads and models raise many types of errors
        raise InputError(what_failed(args, e, file)) from e
    model.pretrained_cfg.pop('state_dict', None)
    if trained:
        set_data_config(model, trained)
    if file:  # other weights have the white level in their config
        set_white_level(model, trained.get('white_level'))
    if num_classes not in (None, model.num_classes):
        model.reset_classifier(num_classes)
    if (channels := model.pretrained_cfg['input_size'][0]) not in MODES:
        raise InputError(f'{args.model} takes images of {channels} channels, but files are read as 3 (RGB) or 1 (gray)')
    if model.num_classes == 0:
        raise InputError(f'the weights of {file or args.model} have no classifier')
    return model


def load_mobileformer(args: argparse.Namespace) -> Any:
    """Create a Mobile-Former with its weights, see `load_model`.

    Raises:
        InputError: As `load_model`, or the model is not a Mobile-Former.
    """
    name, known = find_model(args.model), timm.list_models(module='mobileformer')
    if not name.startswith(HAVE_WEIGHTS) and get_arch_name(name) not in known:
        raise InputError(f'{name} is not a Mobile-Former; choose from {", ".join(known)}')
    model = load_model(args)
    if not isinstance(model, MobileFormer):
        raise InputError(f'{args.model} is a {type(model).__name__}, not a Mobile-Former')
    return model


def read_names(file: Path, num_classes: int) -> List[str]:
    """Read class names, one per line.

    Raises:
        InputError: The number of names differs from `num_classes`.
    """
    try:
        names = [line.strip() for line in file.read_text('utf-8-sig').splitlines() if line.strip()]
    except UnicodeDecodeError as e:
        raise InputError(f'{file} is not in UTF-8') from e
    if len(names) != num_classes:
        raise InputError(f'{file} names {plural(len(names), "class")}, the model has {num_classes:,}')
    return names


def class_names(model: Any, file: Optional[Path] = None) -> List[str]:
    """Return the class names of a model by index: from a file, else from its config or ImageNet, else numbers.

    Raises:
        InputError: The number of names in the file differs from the model's number of classes.
    """
    n, cfg = model.num_classes, model.pretrained_cfg
    subset = infer_imagenet_subset(model)
    if file:
        return read_names(file, n)
    if len(cfg.get('label_names') or ()) == n:
        info: Any = CustomDatasetInfo(cfg['label_names'], cfg.get('label_descriptions'))
    elif subset:
        info = ImageNetInfo(subset)
    else:
        return [f'class {i}' for i in range(n)]
    return list(map(DatasetInfoLabelMapper(info), range(n)))
