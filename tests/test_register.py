"""An installed package is all timm needs to know the models by name; fresh processes show it."""
import os
import pickle
import re
import subprocess
import sys
import zipfile
from importlib.metadata import requires
from pathlib import Path

import pytest

from timm_mobileformer import versions

COUNT = "len(timm.list_models('*mobileformer*'))"


def python(*args, **env):
    """Run Python outside of the checkout and return what it printed."""
    run = subprocess.run([sys.executable, *args], env={**os.environ, **env}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv('TORCH_DEVICE_BACKEND_AUTOLOAD', raising=False)


def test_pytorch_is_told_of_the_package():
    assert 'timm_mobileformer' in python('-c', (
        "from importlib.metadata import entry_points; print([e.name for e in entry_points(group='torch.backends')])"
    )), 'install the package again, its entry point is missing'


def test_script_that_knows_only_a_name_and_its_workers(tmp_path):
    script = tmp_path / 'script.py'
    script.write_text(
        'import multiprocessing, timm\n'
        'def count(_):\n'
        f'    return {COUNT}\n'
        "if __name__ == '__main__':\n"
        "    print(type(timm.create_model('test_mobileformer')).__name__)\n"
        '    for method in multiprocessing.get_all_start_methods():\n'
        '        with multiprocessing.get_context(method).Pool(1) as pool:\n'
        '            print(pool.map(count, [0]))\n')
    assert python(str(script)).split() == ['MobileFormer'] + ['[8]'] * 3


@pytest.mark.skipif('PYTHONPATH' in os.environ, reason='python -I does not read PYTHONPATH, where the package may be')
def test_isolated_python():
    assert python('-I', '-c', f'import timm; print({COUNT})') == '8'


def test_only_a_submodule_of_timm_is_imported_and_timm_is_left_as_it_was():
    assert python('-c', (
        'import timm.models.resnet, timm.models as m, inspect; '
        "print(m.is_model('mobileformer_294m'), m.__spec__.loader is m.__loader__, type(m.__loader__).__name__, "
        "'is_model' in inspect.getsource(m))"
    )) == 'True True SourceFileLoader True'


def test_without_timm_nothing_is_imported():
    assert python('-c', (
        "import torch, sys; print([m for m in sys.modules if m.partition('.')[0] in ('timm', 'timm_mobileformer')])"
    )) == "['timm_mobileformer']"


def test_importing_the_package_imports_neither_timm_nor_torch():
    assert python('-c', (
        "import timm_mobileformer, sys; print([m for m in ('timm', 'torch', 'numpy') if m in sys.modules])")) == '[]'


def test_switched_off_until_the_package_is_imported():
    assert python('-c', (
        f'import timm; print({COUNT}); import timm_mobileformer; print({COUNT})'
    ), TORCH_DEVICE_BACKEND_AUTOLOAD='0') == '0\n8'


def test_package_imported_first_and_another_finder_like_ours():
    assert python('-c', (
        'import sys, timm_mobileformer as t; sys.meta_path.insert(0, t._ModelsFinder()); import timm; '
        f'print({COUNT}, type(timm.models.__loader__).__name__)'
    ), TORCH_DEVICE_BACKEND_AUTOLOAD='0') == '8 SourceFileLoader'


FINDERS = """
import copy, importlib.machinery, pickle, sys
import torch

def reimport():
    for name in [name for name in sys.modules if name.partition('.')[0] == 'timm']:
        del sys.modules[name]
    import timm
    model = timm.create_model('test_mobileformer')
    assert type(model) is timm_mobileformer.MobileFormer and type(model).__module__ in sys.modules
    assert type(timm.models.__spec__.loader).__name__ == type(timm.models.__loader__).__name__ == 'SourceFileLoader'
    return len(timm.list_models('*mobileformer*'))

class Wrapper:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        spec = self.finder.find_spec(name, path, target)
        if spec and name == 'timm.models':
            spec.loader = self.copied(spec.loader)
        return spec
    copied = staticmethod(lambda loader: loader)

class Legacy:  # as before Python 3.4, and ignored from 3.12 on
    def find_module(self, name, path=None):
        pass

import timm_mobileformer
usual = list(sys.meta_path)
print(reimport(), reimport())  # as it is, and with timm removed from sys.modules
sys.meta_path[:] = [Legacy(), *usual, Legacy()]
print(reimport())
sys.meta_path[:] = map(Wrapper, usual)
print(reimport())
sys.meta_path[:] = map(Wrapper, sys.meta_path)
Wrapper.copied = staticmethod(lambda loader: pickle.loads(pickle.dumps(copy.deepcopy(copy.copy(loader)))))
print(reimport())

class Own(Wrapper):  # answers itself, so that nobody is asked who comes later
    def find_spec(self, name, path=None, target=None):
        return self.finder.find_spec(name, path, target) if name.startswith('timm.') else None
sys.meta_path[:] = [Own(importlib.machinery.PathFinder), *usual]
for name in [name for name in sys.modules if name.partition('.')[0] == 'timm']:
    del sys.modules[name]
import timm
assert timm_mobileformer.MobileFormer
print(len(timm.list_models('*mobileformer*')))
"""


def test_whatever_else_finds_modules_and_however_often_timm_is_imported_the_models_are_there():
    assert python('-c', FINDERS).split() == ['8'] * 6


def test_a_thread_may_read_a_public_name_while_another_one_imports_timm():
    assert python('-c', (
        'import sys, threading, torch, timm_mobileformer\n'
        'class Finder:\n'
        '    def find_spec(self, name, path, target=None):\n'
        "        if name == 'timm.layers':\n"
        '            reader.start()\n'
        '            reader.join(0.5)\n'
        "reader = threading.Thread(target=lambda: print(timm_mobileformer.MobileFormer.__name__))\n"
        'sys.meta_path.insert(0, Finder())\n'
        'import timm\n'
        f'reader.join(); print({COUNT})')) == 'MobileFormer\n8'


def test_the_package_can_be_imported_from_a_zip_file(tmp_path):
    package = Path(versions.__file__).parent
    with zipfile.ZipFile(tmp_path / 'package.zip', 'w') as archive:
        for path in package.glob('*.py'):
            archive.write(path, f'timm_mobileformer/{path.name}')
    assert python('-c', f'import timm, timm_mobileformer as t; print({COUNT}, t.__loader__.archive)',
                  PYTHONPATH=str(tmp_path / 'package.zip')) == f'8 {tmp_path}/package.zip'


def test_failure_to_load_leaves_timm_usable():
    run = subprocess.run([sys.executable, '-c', (
        "import sys; sys.modules['timm_mobileformer.mobileformer'] = None\n"
        f"import timm; print({COUNT}, timm.is_model('resnet18'))"
    )], capture_output=True, text=True)
    assert run.stdout == '0 True\n'
    assert 'timm_mobileformer failed to load: ModuleNotFoundError' in run.stderr


def test_a_timm_that_is_too_old_is_named_beside_the_one_that_is_needed():
    too_old = "import sys, types; sys.modules['timm.version'] = types.SimpleNamespace(__version__='1.0.2')\n"
    run = subprocess.run([sys.executable, '-c', too_old + f"import timm; print({COUNT}, timm.is_model('resnet18'))"],
                         capture_output=True, text=True)
    assert run.stdout == '0 True\n'
    assert 'timm 1.0.2 is too old, the models need timm 1.0.3 or later' in run.stderr


def test_pip_is_asked_for_the_versions_that_are_checked():
    required = requires('timm_mobileformer')
    assert [r for r in required if r.startswith('timm>')][0] == f'timm>={versions.MODELS}'
    for extra in 'demo', 'export', 'openvino', 'executorch':
        assert any(re.fullmatch(f'timm>={versions.COMMANDS}; extra == .{extra}.', r) for r in required), extra
    assert versions.is_older('1.0.3.dev0', '1.0.29') and not versions.is_older('1.0.29', '1.0.29')
    assert not versions.is_older('1.1.0a1', '1.0.29')


def test_a_model_unpickles_in_a_process_that_imported_nothing(tmp_path):
    import timm
    (tmp_path / 'model.pkl').write_bytes(pickle.dumps(timm.create_model('test_mobileformer')))
    assert python('-c', (
        "import pickle; print(type(pickle.load(open('model.pkl', 'rb'))).__name__)"
    ), TORCH_DEVICE_BACKEND_AUTOLOAD='0') == 'MobileFormer'


def test_public_names():
    import timm_mobileformer
    star = {}
    exec('from timm_mobileformer import *', star)
    for name in timm_mobileformer.__all__:
        assert star[name] is getattr(timm_mobileformer, name)
        assert star[name].__name__ == name
        assert name in dir(timm_mobileformer)
    with pytest.raises(AttributeError, match="'timm_mobileformer' has no attribute 'MobileFormers'"):
        timm_mobileformer.MobileFormers  # noqa: B018
