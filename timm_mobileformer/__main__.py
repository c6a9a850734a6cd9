"""Run a script, timm's train.py or any other, with the Mobile-Formers registered; without a script, list them.

    python -m timm_mobileformer train.py --config mobileformer_294m --data-dir /imagenet

What follows --config may be the name of a recipe that comes with the package instead of a file.
"""
import argparse
import io
import os
import sys
import types
from pathlib import Path
from typing import Any, List

RECIPES = Path(__file__).parent / 'recipes'


def find_recipe(option: str, value: str) -> str:
    """The file of the recipe that `--config` names, unless a file of that name exists; any other value as it is."""
    recipe = RECIPES / f'{value}.yaml'
    if option in ('-c', '--config') and recipe.is_file() and not os.path.exists(value):
        return str(recipe)
    return value


def run_script(script: str, args: List[str]) -> None:
    """Run a script as `python SCRIPT ARGS...` would."""
    path = os.path.abspath(script)
    try:
        with io.open_code(path) as f:
            source = f.read()
    except OSError as e:
        print(f"{sys.executable}: can't open file {path!r}: [Errno {e.errno}] {e.strerror}", file=sys.stderr)
        sys.exit(2)
    sys.argv = [script, *map(find_recipe, [script, *args], args)]
    if not getattr(sys.flags, 'safe_path', sys.flags.isolated):  # safe_path came with Python 3.11
        sys.path[0] = os.path.dirname(os.path.realpath(path))
    main_module = sys.modules['__main__'] = types.ModuleType('__main__')
    main_module.__file__ = path
    try:
        exec(compile(source, path, 'exec'), main_module.__dict__)
    except Exception as e:
        tb = e.__traceback__
        while tb and tb.tb_frame.f_code.co_filename != path:  # none of our frames in the traceback
            tb = tb.tb_next
        sys.excepthook(type(e), e.with_traceback(tb), tb)
        sys.exit(1)


def list_models() -> None:
    """Print a line for every model."""
    import timm
    import torch

    from .benchmark import count_macs
    from .pretrained import PAPER_TOP1

    print(f"{'model':<18} {'parameters':>10} {'MACs':>8} {'top-1':>6}  weights")
    for name in sorted(timm.list_models('*mobileformer*'), key=lambda n: PAPER_TOP1.get(n, 0)):
        model = timm.create_model(name, device='meta')
        cfg: Any = model.pretrained_cfg
        params = sum(p.numel() for p in model.parameters())
        macs = f"{count_macs(model, torch.empty(1, *cfg['input_size'], device='meta')) / 1e6:.1f} M"
        weights = f"hf-hub:{cfg['hf_hub_id']}" if cfg.get('hf_hub_id') else 'none'
        print(f"{name:<18} {params:>10,} {macs:>8} {PAPER_TOP1.get(name, '-'):>6}  {weights}")
    recipes = ', '.join(sorted(p.stem for p in RECIPES.glob('*.yaml')))
    print(f"""
MACs of the convolutions and matrix products, for an image of 224x224 (test_mobileformer: 160x160).
Top-1 on ImageNet-1k in percent as the paper (arXiv 2108.05895) reports it; it was not measured here.
Weights: where pretrained=True loads them from.

Recipes for train.py --config: {recipes}
in {RECIPES}""")


def main() -> None:
    if len(sys.argv) > 1 and not sys.argv[1].startswith('-'):
        run_script(sys.argv[1], sys.argv[2:])
        return
    argparse.ArgumentParser(
        prog='python -m timm_mobileformer',
        usage='%(prog)s [-h] [SCRIPT ARGS...]',
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args()
    list_models()


if __name__ == '__main__':
    main()
