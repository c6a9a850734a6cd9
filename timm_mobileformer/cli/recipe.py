"""Print where a recipe for timm's train.py is, or which recipes there are."""
import argparse

from .options import RECIPES
from .terminal import InputError

__all__ = ['run']


def run(args: argparse.Namespace) -> None:
    names = sorted(path.stem for path in RECIPES.glob('*.yaml'))
    if args.name is None:
        print('\n'.join(names))
    elif args.name in names:
        print(RECIPES / f'{args.name}.yaml')
    else:
        raise InputError(f'there is no recipe {args.name}; these are: {", ".join(names)}')
