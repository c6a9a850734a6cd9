"""Sources of pretrained weights: the Hugging Face Hub, else the authors' file on Google Drive."""
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
from .authors_weights import WEIGHTS, drive_page, file_by_hand, get_authors_weights
from .checkpoint import CheckpointMismatchError
from .download_errors import is_xet_error, why

__all__ = ['cached_hub_file', 'hub_repository', 'resolve_weights']

_logger = logging.getLogger(__name__)

SOURCES = 'source', 'state_dict', 'file', 'url', 'hf_hub_id', 'hf_hub_filename'  # fields of timm's PretrainedCfg
# Errors of downloads, damaged files and mismatched weights; timm wraps UnpicklingError.
_HUB_ERRORS = OSError, HTTPError, EntryNotFoundError, HFValidationError
_XET_ERRORS = RuntimeError, ImportError, ValueError
_FILE_ERRORS = SafetensorError, UnpicklingError, CheckpointMismatchError


def hub_repository(variant: str) -> str:
    """Return the Hub repository of a variant: that of its config, or one in the namespace TIMM_MOBILEFORMER_HUB.

    The variable may include a revision: `my-org@v1`.
    """
    if named := os.environ.get('TIMM_MOBILEFORMER_HUB'):
        namespace, at, revision = named.partition('@')
        return f'{namespace}/{variant}.{AUTHORS_TAG}{at}{revision}'
    cfg: Any = get_pretrained_cfg(variant)
    return cfg.hf_hub_id


def cached_hub_file(repository: str, cache_dir: Any = None) -> Optional[str]:
    """Return the path of the cached weights of a Hub repository, None if they are not cached."""
    repo_id, revision = hf_split(repository)
    found = try_to_load_from_cache(repo_id, WEIGHTS, cache_dir=cache_dir, revision=revision)
    return found if isinstance(found, str) else None


def _from_hub(repository: str, cache_dir: Any) -> str:
    repo_id, revision = hf_split(repository)
    if not cached_hub_file(repository, cache_dir):
        # fails fast, whereas hf_hub_download retries for almost a minute
        get_hf_file_metadata(hf_hub_url(repo_id, WEIGHTS, revision=revision), timeout=constants.HF_HUB_ETAG_TIMEOUT)
    return hf_hub_download(repo_id, WEIGHTS, revision=revision, cache_dir=cache_dir, library_name='timm_mobileformer')


def find_weights(variant: str, repository: Optional[str], cache_dir: Any = None) -> str:
    """Return the path of the authors' weights from the first available source.

    1. A repository on the Hugging Face Hub, or its cached files.
    2. The authors' file in the cache.
    3. The authors' file on Google Drive, which is converted to safetensors and cached.

    Args:
        variant: Name of the model without a tag.
        repository: Hub repository, NAMESPACE/NAME or NAMESPACE/NAME@REVISION; None skips the Hub.
        cache_dir: Cache folder (default: that of huggingface_hub).

    Raises:
        RuntimeError: No source is available; the message lists the reasons and alternatives.
    """
    tried = {}
    if repository:
        try:
            file = _from_hub(repository, cache_dir)
            _logger.info(f'{variant}: loading weights from the Hugging Face repository {repository}; '
                         'the authors state no licence for them')
            return file
        except Exception as e:
            if not _is_hub_error(e):
                raise
            tried[_name(repository)] = why(e)
    try:
        file = str(get_authors_weights(variant, cache_dir))
    except Exception as e:  # gdown, requests and urllib3 raise many types of errors
        tried["the authors' file on Google Drive"] = why(e)
        by_hand = f'open {drive_page(variant)} in a browser and save the file as {file_by_hand(variant, cache_dir)}, '
        raise RuntimeError(_explain(variant, tried, by_hand)) from e
    _logger.info(f"{variant}: loading weights from the authors' file {drive_page(variant)}, cached in {file}; "
                 'the authors state no licence for them')
    return file


@contextmanager
def resolve_weights(variant: str, pretrained: bool, kwargs: Dict[str, Any]) -> Iterator[Dict[str, Any]]:
    """Yield the arguments of `build_model_with_cfg`, completed with the source of the weights.

    A source given by the caller or TIMM_MOBILEFORMER_HUB is passed to timm, without a fallback.

    Args:
        variant: Name of the model without a tag.
        pretrained: Whether to load weights.
        kwargs: Arguments of `build_model_with_cfg`.

    Raises:
        RuntimeError: The weights cannot be loaded.
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
        kwargs = {key: value for key, value in kwargs.items() if key != 'cache_dir'}  # not supported by timm < 1.0.13
    try:
        yield {**kwargs, 'pretrained_cfg_overlay': overlay}
    except Exception as e:
        cfg = resolve_pretrained_cfg(variant, kwargs.get('pretrained_cfg'), overlay)
        source, _ = _resolve_pretrained_source(cfg.to_dict())
        about_weights = _is_hub_error(e) or isinstance(e, _FILE_ERRORS) or isinstance(e.__cause__, UnpicklingError)
        if not about_weights or is_named and source != 'hf-hub':
            raise
        failed = _name(cfg.hf_hub_id) if is_named else overlay['file']
        raise RuntimeError(_explain(variant, {failed: why(e)})) from e


def _is_hub_error(error: Exception) -> bool:
    return isinstance(error, _HUB_ERRORS) or isinstance(error, _XET_ERRORS) and is_xet_error(error)


def _name(repository: Any) -> str:
    return f'the Hugging Face repository {repository} ({constants.ENDPOINT})'


def _explain(variant: str, tried: Dict[str, str], by_hand: str = '') -> str:
    """Return an error message that lists the reason for each source, and alternatives."""
    return '\n'.join([
        f'{variant}: pretrained weights could not be loaded.',
        *(f'From {source}: {reason}.' for source, reason in tried.items()),
        f"Alternatives: {by_hand}load a file with pretrained_cfg_overlay=dict(file='FILE') or --checkpoint FILE, or "
        "use your own repository with pretrained_cfg_overlay=dict(hf_hub_id='NAMESPACE/NAME'), hf-hub:NAMESPACE/NAME, "
        'or the environment variable TIMM_MOBILEFORMER_HUB=NAMESPACE.'])
