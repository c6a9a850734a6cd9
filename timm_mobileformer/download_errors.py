"""Error messages for failed downloads and uploads: Hugging Face Hub, Google Drive and disk errors."""
import errno
import traceback

__all__ = ['is_xet_error', 'why']

# Keyed by class name to avoid importing the libraries.
_REASONS = {
    'OfflineModeIsEnabled': 'HF_HUB_OFFLINE is set',
    'GatedRepoError': 'the repository is gated; request access on its page',
    'RepositoryNotFoundError': 'it does not exist, or it is private and the token has no read access',
    'RevisionNotFoundError': 'it has no such revision',
    'EntryNotFoundError': 'it contains no model.safetensors',
    'RemoteEntryNotFoundError': 'it contains no model.safetensors',
    'SafetensorError': 'the file is damaged; delete it to download it again',
    'UnpicklingError': 'refused, the file is not a checkpoint, or loading it would execute code',
    'TooManyRedirects': 'too many redirects',
    'DownloadCancelled': 'no data received for 30 seconds',
    'Timeout': 'no data received for 30 seconds',
    'ReadTimeout': 'the request timed out',
    'ConnectTimeout': 'the request timed out',
}
_WRITING = {
    401: 'the token is invalid (401); log in with `hf auth login` or set HF_TOKEN',
    403: 'the token has no write access (403); ask {0} for permission, or use your own --namespace',
    404: 'not found (404); check that the namespace {0} exists and that the token has write access to it',
    409: 'the repository was changed in the meantime (409); check it, and run this again',
    412: 'the repository was changed in the meantime (412); check it, and run this again',
}


def is_xet_error(error: BaseException) -> bool:
    """Return whether huggingface_hub raised an error while it downloaded through hf_xet.

    Such errors have built-in types, for instance RuntimeError, and only the traceback tells them from others.
    """
    return any(frame.f_code.co_name == 'xet_get' and frame.f_globals['__name__'].startswith('huggingface_hub.')
               for frame, _ in traceback.walk_tb(error.__traceback__))


def why(error: BaseException, namespace: str = '') -> str:
    """Return the reason of a failed download, or of a failed upload to `namespace`, in one line."""
    causes = [error]
    while cause := causes[-1].__cause__ or causes[-1].__context__:
        causes.append(cause)
    responses = [response for e in causes if (response := getattr(e, 'response', None)) is not None]
    status = responses[0].status_code if responses else 0
    if namespace and status in _WRITING:
        return _WRITING[status].format(namespace)
    for e in causes:
        if type(e).__name__ in _REASONS:
            return _REASONS[type(e).__name__]
        if isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return f'{e.strerror}; free some space, or set HF_HOME to another folder'
        if isinstance(e, OSError) and e.errno and e.filename:
            return f'{e.filename}: {e.strerror}'
    if status:
        return f'the server answered {status}' + ('; try again later' if status >= 500 else '')
    # gdown adds advice about its own command; its cause is the message of Google Drive
    said = causes[1] if type(error).__name__ == 'FileURLRetrievalError' and len(causes) > 1 else error
    text = ' '.join(str(said).split()).rstrip('.') or type(said).__name__
    text = text if len(text) <= 1000 else f'{text[:1000]} …'
    return f'{text}; set HF_HUB_DISABLE_XET=1 to download without hf_xet' if is_xet_error(error) else text
