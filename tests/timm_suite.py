"""Run the model tests of timm itself on our models: every test of the installed version that names one of them.

    python tests/timm_suite.py [--downloads] [PYTEST ARGS]

timm's tests come from its source distribution, once, into build/. Nothing in them is changed but the lists of models
that they run on. The tests that load pretrained weights run with --downloads, where HF_ENDPOINT names a Hub that has
them.
"""
import ast
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any, Dict, List, Tuple

import timm

import timm_mobileformer.mobileformer  # noqa: F401  (registers the models)

OURS = timm.list_models(module='mobileformer')
FEW = ['test_mobileformer', 'mobileformer_26m']  # 26m: grouped, and the map of its stem is a feature map

# What lists models by name, and the entries to add: of a variable, or of a test's parametrize.
ADDITIONS: Dict[str, List[Any]] = {
    'FEAT_INTER_FILTERS': ['mobileformer'],
    'test_mobile_model_fusion_features': [(m, {}) for m in OURS],
    'test_model_init_weights_after_to_empty': [(m, {}) for m in OURS],
    'test_reset_classifier_keeps_pool': FEW,
    'test_model_features_output_stride': FEW,
    'test_feature_getter_stage_ends_torchscript': FEW,
    'test_prune_intermediate_layers_params_used': FEW,
    'test_head_hidden_size': [(m, {}) for m in FEW],
    'test_catavgmax_unsupported': FEW,
    'test_features_only_feature_cls_class': FEW,
    'test_forward_after_prune_intermediate_layers': FEW,
    'test_prune_intermediate_layers_last_feature': [(m, True) for m in FEW],
    'test_prune_to_stem_feature': FEW,
    'test_forward_intermediates_stop_early_final_norm': [(m, {}) for m in FEW],
    'test_headless_checkpoint_reload': [(m, {}) for m in FEW],
}
DOWNLOADS = 'test_model_load_pretrained or test_model_features_pretrained or test_model_inference'


def fetch(folder: Path) -> Path:
    """The source distribution of the installed timm."""
    name = f'timm-{timm.__version__}.tar.gz'
    if not (folder / name).exists():
        subprocess.run([
            sys.executable, '-m', 'pip', 'download', '--quiet', '--no-deps', '--no-binary', 'timm',
            f'timm=={timm.__version__}', '--dest', folder,
        ], check=True)
    return folder / name


def unpack(sdist: Path) -> Path:
    """A folder with timm's tests and the configuration of its pytest, without timm."""
    root = sdist.parent / sdist.name.removesuffix('.tar.gz')
    with tarfile.open(sdist) as tar:
        for member in tar:
            path = Path(*Path(member.name).parts[1:])
            if member.isfile() and path.parts[0] in ('tests', 'pyproject.toml') and '..' not in path.parts:
                (root / path).parent.mkdir(parents=True, exist_ok=True)
                (root / path).write_bytes(tar.extractfile(member).read())  # type: ignore[union-attr]
    return root


def find_lists(source: str) -> Dict[str, Tuple[ast.List, int]]:
    """The list of models of every top-level variable and parametrised test."""
    out: Dict[str, Any] = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            out[node.targets[0].id] = node.value
        elif isinstance(node, ast.FunctionDef):
            for call in node.decorator_list:
                if isinstance(call, ast.Call) and ast.unparse(call).startswith("pytest.mark.parametrize('model_name"):
                    out[node.name] = call.args[1]
    return {k: v for k, v in out.items() if isinstance(v, ast.List)}


def add_models(source: str) -> str:
    """timm's test_models.py with our models in its lists.

    Raises:
        SystemExit: It has no such list any more.
    """
    lists = find_lists(source)
    if missing := set(ADDITIONS) - set(lists):
        sys.exit(f"timm {timm.__version__} has no list of models in {', '.join(sorted(missing))}: adapt {__file__}")
    lines = source.encode().splitlines(keepends=True)
    for name, node in sorted(lists.items(), key=lambda item: -item[1].lineno):  # from the end, positions stay valid
        if name in ADDITIONS:
            last = node.elts[-1]
            line, column = last.end_lineno - 1, last.end_col_offset
            added = ''.join(f', {entry!r}' for entry in ADDITIONS[name])
            lines[line] = lines[line][:column] + added.encode() + lines[line][column:]
    return b''.join(lines).decode()


def main(args: List[str]) -> int:
    root = unpack(fetch(Path(__file__).parents[1] / 'build' / 'timm_suite'))
    tests = root / 'tests' / 'test_models.py'
    tests.write_text(add_models(tests.read_text()))
    downloads = '--downloads' in args
    return subprocess.run([
        sys.executable, '-m', 'pytest', tests, '-c', root / 'pyproject.toml', '--rootdir', root,
        '-p', 'timm_mobileformer.mobileformer',  # imported before the tests are collected
        '-k', f"mobileformer and {'' if downloads else 'not '}({DOWNLOADS})", '-q', '-rs',
        *(a for a in args if a != '--downloads'),
    ], env={  # where GITHUB_ACTIONS is set, timm leaves tests out
        'OMP_NUM_THREADS': '1', **{k: v for k, v in os.environ.items() if k != 'GITHUB_ACTIONS'}}).returncode


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
