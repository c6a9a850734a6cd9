"""Why a download or an upload failed, in words: one table for the Hugging Face Hub, Google Drive and the disk."""
import errno

__all__ = ['why']

# By the name of the error, so that none of the libraries has to be imported.
_REASONS = {
    'OfflineModeIsEnabled': 'HF_HUB_OFFLINE is set',
    'GatedRepoError': 'access to it has to be requested on its page',
    'RepositoryNotFoundError': 'it does not exist, or is private and your token may not read it',
    'RevisionNotFoundError': 'it has no such revision',
    'EntryNotFoundError': 'it holds no model.safetensors',
    'RemoteEntryNotFoundError': 'it holds no model.safetensors',
    'SafetensorError': 'the file is damaged; delete it to download it again',
    'UnpicklingError': 'refused, the file is no checkpoint or would run code when it is read',
    'TooManyRedirects': 'its pages lead to each other in a circle',
    'DownloadCancelled': 'no byte of the file for 30 seconds',
    'Timeout': 'no byte for 30 seconds',
    'ReadTimeout': 'no answer in time',
    'ConnectTimeout': 'no answer in time',
}
_WRITING = {
    401: 'the Hub does not know the token (401); log in with `hf auth login` or set HF_TOKEN',
    403: 'the token may not write there (403); ask {0} for permission, or name your own --namespace',
    404: 'not found (404); is there a namespace {0}, and may the token write to it?',
    409: 'somebody else changed it in the meantime (409); look at it, and run this again',
    412: 'somebody else changed it in the meantime (412); look at it, and run this again',
}


def why(error: BaseException, namespace: str = '') -> str:
    """The reason of a failed download, or of an upload to a namespace of the Hub, in one line."""
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
    # gdown's advice is about its own command; what Drive's page says comes before it
    said = causes[1] if type(error).__name__ == 'FileURLRetrievalError' and len(causes) > 1 else error
    text = ' '.join(str(said).split()).rstrip('.') or type(said).__name__
    return text if len(text) <= 1000 else f'{text[:1000]} …'
