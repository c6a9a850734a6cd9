"""A model and its weights, by the names that every subcommand takes."""
import argparse
import difflib
import os
import textwrap
from typing import Any

import timm
import torch
import torch.nn as nn
from timm.models import resolve_model_input_args

import timm_mobileformer  # noqa: F401  registers the models

from .terminal import InputError, some

__all__ = ['load_model', 'pick_device']


def pick_device(args: argparse.Namespace) -> torch.device:
    """The device that `--device` names, else the accelerator that PyTorch finds, else the CPU."""
    found: Any = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else 'cpu'
    try:
        device = torch.device(args.device or found)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as e:
        raise InputError(f'--device {args.device}: {textwrap.shorten(str(e), 300)}') from e
    return device


def load_model(args: argparse.Namespace, num_classes: int, weights: bool = True, **kwargs: Any) -> nn.Module:
    """The model that `--model` names for so many classes, with the weights to start from or without."""
    name = f'local-dir:{args.model}' if os.path.isdir(args.model) else args.model
    file = str(args.checkpoint) if args.checkpoint and weights else None
    pretrained = weights and (args.pretrained or bool(file) or name.startswith(('local-dir:', 'hf-hub:')))
    if file and not os.path.isfile(file):
        raise InputError(f'no such checkpoint: {file}')
    try:
        input_args = resolve_model_input_args(name, {'img_size': args.img_size})
        return timm.create_model(
            name,
            pretrained=pretrained,
            pretrained_cfg_overlay=dict(file=file, num_classes=-1) if file else None,  # -1: never its classifier
            num_classes=num_classes,
            **{k: v for k, v in input_args.items() if k == 'img_size'},
            **kwargs,
        )
    except Exception as e:  # files, networks and models fail in ways of their own
        reason = textwrap.shorten(str(e) or type(e).__name__, 600)
        if str(e).startswith('Unknown model'):
            similar = difflib.get_close_matches(args.model, timm.list_models())
            raise InputError(reason + (f'; similar: {some(similar)}' if similar else '')) from e
        raise InputError(f'{args.model} cannot start from {file}: {reason}' if file else reason) from e
