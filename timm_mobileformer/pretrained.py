"""Where `pretrained=True` finds weights: the Hugging Face Hub, else the authors' own file."""
import logging
import os
from contextlib import contextmanager
from pickle import UnpicklingError
from typing import Any, Dict, Iterator, Optional

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, HTTPError
from safetensors import SafetensorError
from timm.models import get_pretrained_cfg, resolve_pretrained_cfg
from timm.models._builder import _resolve_pretrained_source
from timm.models._hub import hf_split

from .authors import AUTHORS_FILES, AUTHORS_TAG
from .checkpoint import CheckpointMismatchError
from .download_errors import why

__all__ = ['cached_hub_file', 'find_weights', 'hub_repository', 'with_weights']

_logger = logging.getLogger(__name__)

WEIGHTS = 'model.safetensors'
SOURCES = 'source', 'state_dict', 'file', 'url', 'hf_hub_id', 'hf_hub_filename'  # of timm's PretrainedCfg
# Of a download, of the file, and of weights that do not fit; timm wraps those of a pickle.
_HUB_ERRORS = OSError, HTTPError, EntryNotFoundError, HFValidationError
_FILE_ERRORS = SafetensorError, UnpicklingError, CheckpointMismatchError


def hub_repository(variant: str) -> str:
    """Hub repository of a variant's weights: its config's, or in the namespace that TIMM_MOBILEFORMER_HUB names.

    The variable may end in a revision, `my-org@v1`.
    """
    if named := os.environ.get('TIMM_MOBILEFORMER_HUB'):
        namespace, at, revision = named.partition('@')
        return f'{namespace}/{variant}.{AUTHORS_TAG}{at}{revision}'
    cfg: Any = get_pretrained_cfg(variant)
    return cfg.hf_hub_id


def cached_hub_file(repository: str, cache_dir: Any = None) -> Optional[str]:
    """The weights of a Hub repository if they are in the cache."""
    repo_id, revision = hf_split(repository)
    found = try_to_load_from_cache(repo_id, WEIGHTS, cache_dir=cache_dir, revision=revision)
    return found if isinstance(found, str) else None


def _from_hub(repository: str, cache_dir: Any) -> str:
    repo_id, revision = hf_split(repository)
    if not cached_hub_file(repository, cache_dir):
        # raises at once, where hf_hub_download tries for most of a minute
        get_hf_file_metadata(hf_hub_url(repo_id, WEIGHTS, revision=revision), timeout=constants.HF_HUB_ETAG_TIMEOUT)
    return hf_hub_download(repo_id, WEIGHTS, revision=revision, cache_dir=cache_dir, library_name='timm_mobileformer')


def find_weights(variant: str, repository: Optional[str], cache_dir: Any = None) -> str:
    """Return the file with the authors' weights, from the first source that can be reached.

    1. A repository of the Hugging Face Hub, or its files in the cache.
    2. The authors' file in the cache.
    3. The authors' file on Google Drive, which is converted and cached.

    Args:
        variant: Name of the model without a tag.
        repository: Hub repository, NAMESPACE/NAME or NAMESPACE/NAME@REVISION; None skips the Hub.
        cache_dir: Folder of the cache, that of huggingface_hub by default.

    Raises:
        RuntimeError: No source has the weights; the error names each reason and what can be done.
    """
    from .authors_weights import drive_page, file_by_hand, get_authors_weights

    tried = {}
    if repository:
        try:
            file = _from_hub(repository, cache_dir)
            _logger.info(f'{variant}: weights of the Hugging Face repository {repository}; '
                         'the authors state no licence for them')
            return file
        except _HUB_ERRORS as e:
            tried[_name(repository)] = why(e)
    try:
        file = str(get_authors_weights(variant, cache_dir))
    except Exception as e:  # gdown, requests and urllib3 fail in ways of their own
        tried["the authors' file on Google Drive"] = why(e)
        by_hand = f'open {drive_page(variant)} in a browser and save the file as {file_by_hand(variant, cache_dir)}, '
        raise RuntimeError(_explain(variant, tried, by_hand)) from e
    _logger.info(f"{variant}: weights of the authors' file {drive_page(variant)}, cached in {file}; "
                 'the authors state no licence for them')
    return file


@contextmanager
def with_weights(variant: str, pretrained: bool, kwargs: Dict[str, Any]) -> Iterator[Dict[str, Any]]:
    """Arguments of `build_model_with_cfg` that name the weights to load.

    A source that the caller or TIMM_MOBILEFORMER_HUB names is left to timm, and has no substitute.

    Args:
        variant: Name of the model without a tag.
        pretrained: Weights are loaded.
        kwargs: Arguments of `build_model_with_cfg`.

    Raises:
        RuntimeError: Weights of the Hub cannot be loaded; its cause is the first error.
    """
    if not pretrained or variant not in AUTHORS_FILES:
        yield kwargs
        return
    overlay: Dict[str, Any] = dict(kwargs.get('pretrained_cfg_overlay') or {})
    cfg = resolve_pretrained_cfg(variant, kwargs.get('pretrained_cfg'), overlay)
    registered = get_pretrained_cfg(variant)
    is_named = any(overlay.get(key) or key not in overlay and getattr(cfg, key) != getattr(registered, key)
                   for key in SOURCES)
    if not is_named and cfg.hf_hub_id and os.environ.get('TIMM_MOBILEFORMER_HUB'):
        overlay['hf_hub_id'], is_named = hub_repository(variant), True
    if not is_named:
        overlay['file'] = find_weights(variant, cfg.hf_hub_id, kwargs.get('cache_dir'))
        kwargs = {key: value for key, value in kwargs.items() if key != 'cache_dir'}  # unknown to timm before 1.0.13
    try:
        yield {**kwargs, 'pretrained_cfg_overlay': overlay}
    except Exception as e:
        cfg = resolve_pretrained_cfg(variant, kwargs.get('pretrained_cfg'), overlay)
        source, _ = _resolve_pretrained_source(cfg.to_dict())
        about_weights = isinstance(e, _HUB_ERRORS + _FILE_ERRORS) or isinstance(e.__cause__, UnpicklingError)
        if not about_weights or is_named and source != 'hf-hub':
            raise
        failed = _name(cfg.hf_hub_id) if is_named else overlay['file']
        raise RuntimeError(_explain(variant, {failed: why(e)})) from e


def _name(repository: Any) -> str:
    return f'the Hugging Face repository {repository} ({constants.ENDPOINT})'


def _explain(variant: str, tried: Dict[str, str], by_hand: str = '') -> str:
    """The text of an error that names the reason of each source, and what can be done."""
    return '\n'.join([
        f'{variant}: no pretrained weights.',
        *(f'From {source}: {reason}.' for source, reason in tried.items()),
        f"To go on, {by_hand}load a file by pretrained_cfg_overlay=dict(file='FILE') or --checkpoint FILE, or name "
        "your own copy by pretrained_cfg_overlay=dict(hf_hub_id='NAMESPACE/NAME'), hf-hub:NAMESPACE/NAME, or "
        'TIMM_MOBILEFORMER_HUB=NAMESPACE in the environment.'])
