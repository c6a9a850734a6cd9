"""Mobile-Former (Chen et al., CVPR 2022) for timm.

Importing this package registers the models with timm: immediately if timm is imported already, otherwise when timm is
imported. PyTorch also imports it, through an entry point of the group `torch.backends`, so that the models are
available in programs and libraries that do not import this package. Importing it does not import timm or PyTorch.
"""
import sys
import threading
import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any, List

if TYPE_CHECKING:
    from .attention import attention_maps
    from .checkpoint import checkpoint_filter_fn
    from .dynamic_relu import DynamicReLU
    from .mobileformer import MobileFormer

__all__ = ['DynamicReLU', 'MobileFormer', 'attention_maps', 'checkpoint_filter_fn']
__version__ = '0.1.0'
_MODULES = {
    'DynamicReLU': 'dynamic_relu',
    'MobileFormer': 'mobileformer',
    'attention_maps': 'attention',
    'checkpoint_filter_fn': 'checkpoint',
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    import_module('timm')  # first, to avoid a deadlock with a thread that imports timm
    _register()
    return getattr(import_module(f'.{_MODULES[name]}', __name__), name)


def __dir__() -> List[str]:
    return sorted({*globals(), *__all__})


def _register() -> None:
    """Import the models, which registers them with timm.

    Raises:
        ImportError: The installed timm is too old.
    """
    from . import versions

    found = sys.modules['timm'].__version__
    if versions.is_older(found, versions.MODELS):
        raise ImportError(f'timm {found} is too old, the models need timm {versions.MODELS} or later')
    models = sys.modules.get(f'{__name__}.mobileformer')
    register_model = getattr(models, 'register_model', None)
    if register_model not in (None, sys.modules['timm.models'].register_model):  # timm was re-imported
        for name in [name for name in sys.modules if name.startswith(f'{__name__}.')]:
            del sys.modules[name]
    import_module('.mobileformer', __name__)


class _ModelsLoader:
    """Load `timm.models` with its original loader, then register the models."""

    def __init__(self, loader: Any):
        self.loader = loader

    def __getattr__(self, name: str) -> Any:
        if name == 'loader':  # not set yet while being copied
            raise AttributeError(name)
        return getattr(self.loader, name)

    def exec_module(self, module: Any) -> None:
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        try:
            _register()
        except Exception as e:  # must not break `import timm`
            warnings.warn(
                f'the Mobile-Former models are not registered: {__name__} failed to load: {e!r}', stacklevel=2)


class _ModelsFinder(threading.local):
    """Find `timm.models` with the other finders."""

    asking = False

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != 'timm.models' or name in sys.modules or self.asking:
            return None
        self.asking = True  # other tools may have wrapped this finder, so it cannot exclude itself from the list
        try:
            for finder in list(sys.meta_path):
                find_spec: Any = getattr(finder, 'find_spec', None)
                spec = find_spec and find_spec(name, path, target)
                if spec:
                    if hasattr(spec.loader, 'exec_module'):
                        spec.loader = _ModelsLoader(spec.loader)
                    return spec
        finally:
            self.asking = False
        return None


def _autoload() -> None:
    """Entry point for PyTorch; importing this package is sufficient."""


if hasattr(sys.modules.get('timm'), 'create_model'):
    _register()
else:
    sys.meta_path.insert(0, _ModelsFinder())
