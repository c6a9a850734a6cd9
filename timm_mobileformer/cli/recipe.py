"""`timm-mobileformer recipe`: print the path of a recipe for timm's train.py, or the names of all recipes."""
import argparse
from pathlib import Path

from .console import InputError

HELP = "print the path of a recipe for timm's train.py"
WORK = 'recipe'
RECIPES = Path(__file__).parents[1] / 'recipes'


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Print the path of a recipe for timm's train.py or, without NAME, the names of all recipes:\n\n"
        '  python train.py --config "$(timm-mobileformer recipe finetune)" \\\n'
        '      --model mobileformer_52m --pretrained --num-classes N --data-dir DIR')
    parser.add_argument('name', nargs='?', metavar='NAME')


def run(args: argparse.Namespace) -> None:
    names = sorted(path.stem for path in RECIPES.glob('*.yaml'))
    if args.name is None:
        print('\n'.join(names))
    elif args.name in names:
        print(RECIPES / f'{args.name}.yaml')
    else:
        raise InputError(f'there is no recipe {args.name}; available recipes: {", ".join(names)}')
