"""Run the authors' own program and keep what it answers in authors.safetensors.

    python tests/record_authors.py FOLDER

FOLDER holds mobile_former.py and dna_blocks.py from https://github.com/AAboys/MobileFormer; what they import from the
timm of their time is replaced here.
"""
import contextlib
import importlib
import io
import sys
from types import ModuleType
from typing import Dict

import torch
import torch.nn.functional as F
from authors import (
    ANSWERS,
    EVAL_CASES,
    TRAIN_CASE,
    VARIANTS,
    along,
    author_input,
    author_state_dict,
    direction,
    gradients,
    parts,
    sketch,
)
from safetensors.torch import save_file
from timm.layers import DropPath


def authors_model(folder: str, variant: str) -> torch.nn.Module:
    package = ModuleType('authors_program')
    package.__path__ = [folder]
    sys.modules['authors_program'] = package
    for name, contents in {
        'helpers': dict(
            build_model_with_cfg=lambda cls, variant, pretrained, default_cfg, **kwargs: cls(**kwargs),
            default_cfg_for_features=None,
        ),
        'registry': dict(register_model=lambda fn: fn),
        'layers': dict(DropPath=DropPath),
    }.items():
        module = ModuleType(f'authors_program.{name}')
        vars(module).update(contents)
        sys.modules[module.__name__] = module
    with contextlib.redirect_stdout(io.StringIO()):
        program = importlib.import_module('authors_program.mobile_former')
        return getattr(program, f'mobile_former_{variant}')().double()


@torch.no_grad()
def record_eval(model: torch.nn.Module, x: torch.Tensor) -> Dict[str, torch.Tensor]:
    blocks = []
    hooks = [b.register_forward_hook(lambda m, args, out: blocks.append(out)) for b in model.features]
    logits = model.eval()(x)
    for hook in hooks:
        hook.remove()
    return {
        'logits': sketch(logits),
        'maps': torch.stack([sketch(x) for x, z in blocks]),
        'tokens': torch.stack([sketch(z.transpose(0, 1)) for x, z in blocks]),
    }


def record_train(model: torch.nn.Module, variant: str, x: torch.Tensor) -> Dict[str, torch.Tensor]:
    x.requires_grad_()
    loss = F.cross_entropy(model.train()(x), torch.arange(len(x)))
    loss.backward()
    ways = [direction(variant, part) for part in parts(variant)]
    return {
        'loss': loss,
        'grad_input': sketch(x.grad),
        'grad': torch.stack([along(way, gradients(model)) for way in ways]),
        'stats': torch.stack([along(way, dict(model.named_buffers())) for way in ways]),
    }


def main(folder: str) -> None:
    out: Dict[str, torch.Tensor] = {}
    for variant in VARIANTS:
        model = authors_model(folder, variant)
        for height, width, batch, seed in EVAL_CASES:
            model.load_state_dict(author_state_dict(variant, seed))
            answers = record_eval(model, author_input(height, width, batch, seed))
            out.update({f'{variant}.{height}x{width}.{k}': v for k, v in answers.items()})
        height, width, batch, seed = TRAIN_CASE
        model.load_state_dict(author_state_dict(variant, seed))
        answers = record_train(model, variant, author_input(height, width, batch, seed))
        out.update({f'{variant}.train.{k}': v for k, v in answers.items()})
    save_file({k: v.detach().contiguous() for k, v in out.items()}, ANSWERS)


if __name__ == '__main__':
    main(sys.argv[1])
