"""What a user is told when pretrained weights cannot be had."""
from contextlib import contextmanager
from pickle import UnpicklingError
from typing import Any, Dict, Iterator

from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError
from timm.models import resolve_pretrained_cfg
from timm.models._builder import _resolve_pretrained_source

from .checkpoint import CheckpointMismatchError

__all__ = ['explain_missing_weights', 'why']


def why(error: BaseException) -> str:
    """The reason of a failed download, from the error or what caused it."""
    causes = [error]
    while cause := causes[-1].__cause__ or causes[-1].__context__:
        causes.append(cause)
    for kind, reason in (
            (OfflineModeIsEnabled, 'HF_HUB_OFFLINE is set and the cache does not hold it'),
            (GatedRepoError, 'access to it must be asked for on its page'),
            (RepositoryNotFoundError, 'it does not exist, or is private and your `hf auth login` may not see it'),
            (RevisionNotFoundError, 'it has no such revision'),
            (SafetensorError, 'its file of weights is damaged: publish it again, or delete the copy in your cache'),
    ):
        if any(isinstance(e, kind) for e in causes):
            return reason
    if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
        return 'it holds no weights'
    for e in causes:
        if (response := getattr(e, 'response', None)) is not None:
            return f'the Hub answered {response.status_code}'
    if isinstance(error, LocalEntryNotFoundError):
        return f'the Hub cannot be reached ({error.__cause__ or error})'
    return str(error) or type(error).__name__


# Of a download, of the file that it brings, and of weights that do not fit; timm puts a pickle's into one of its own.
KINDS = (OSError, HTTPError, EntryNotFoundError, HFValidationError, SafetensorError, UnpicklingError,
         CheckpointMismatchError)


@contextmanager
def explain_missing_weights(variant: str, pretrained: bool, kwargs: Dict[str, Any]) -> Iterator[None]:
    """Turn an error about weights from the Hub into one that says what to do; others pass.

    Args:
        variant: Name of the model without a tag.
        pretrained: Weights are loaded.
        kwargs: Arguments of `build_model_with_cfg`, of which the pretrained config tells the repository.

    Raises:
        RuntimeError: The weights cannot be had; its cause is the first error.
    """
    try:
        yield
    except Exception as error:
        cfg = resolve_pretrained_cfg(variant, kwargs.get('pretrained_cfg'), kwargs.get('pretrained_cfg_overlay'))
        source, _ = _resolve_pretrained_source(cfg.to_dict())
        about_weights = isinstance(error, KINDS) or isinstance(error.__cause__, UnpicklingError)
        if not (pretrained and source == 'hf-hub' and about_weights):
            raise
        raise RuntimeError(
            f'{variant}: no weights from the Hugging Face repository {cfg.hf_hub_id} ({constants.ENDPOINT}): '
            f'{why(error)}. Ways on:\n'
            f"  - fetch the authors' own, once: timm-mobileformer weights {variant}\n"
            f'  - take them from another namespace: TIMM_MOBILEFORMER_HUB=NAMESPACE in the environment,'
            f" or pretrained_cfg_overlay=dict(hf_hub_id='NAMESPACE/{variant}.ms_in1k')\n"
            f"  - load a local checkpoint: pretrained_cfg_overlay=dict(file='FILE')\n"
            f'  - publish them: timm-mobileformer publish --model {variant}'
        ) from error
