"""Output folder of a fine-tuning run: locking, saving after every epoch, and resuming."""
import argparse
import hashlib
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Iterator

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from timm.models import save_for_hf
from timm.utils import update_summary

from .console import InputError, quote, reason
from .data import BAD_IMAGES, Data
from .files import atomic_dir, remove_unfinished
from .folders import relative
from .metadata import PREPROCESSING
from .report import History, best_epoch

__all__ = ['PATHS', 'check_is_free', 'claim', 'fingerprint', 'read_state', 'save_epoch']

PATHS = 'data_dir', 'labels', 'checkpoint'  # options that are paths


@contextmanager
def claim(folder: Path) -> Iterator[None]:
    """Lock an output folder for this process, and create it if it does not exist.

    The operating system releases the lock when the process ends for any reason. A folder that is created and stays
    empty is removed.

    Raises:
        InputError: Another process has locked the folder, or it cannot be written to.
    """
    is_new = not folder.exists()
    lock = FileLock(folder / '.lock')
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as e:
        raise InputError(f'another run is writing to {folder}; use another folder') from e
    except FileExistsError as e:
        raise InputError(f'{folder} is a file; use a folder') from e
    except OSError as e:
        raise InputError(f'{folder} cannot be written to ({e.strerror}); use another folder') from e
    try:
        remove_unfinished(folder)
        yield
    finally:
        (folder / '.lock').unlink(missing_ok=True)
        lock.release()
        if is_new and not any(folder.iterdir()):
            folder.rmdir()


def check_is_free(folder: Path) -> None:
    """Check that a new run can write to a folder.

    Raises:
        InputError: The folder is not empty, apart from the files of a run that ended before its first epoch.
    """
    if any(not path.name.startswith('.') and path.name != BAD_IMAGES for path in folder.iterdir()):
        raise InputError(f'{folder} is not empty; name a new folder with --output, remove it, or continue the run in '
                         f'it with --resume {quote(folder)}')


def save_epoch(args: argparse.Namespace, model: Any, kwargs: Dict[str, Any], images_hash: str, optimizer: Any,
               history: History) -> None:
    """Write the state after an epoch to `args.output`, and the weights if the epoch is the best so far.

    Args:
        args: Options of the run.
        model: Model whose `pretrained_cfg` has the names of the classes.
        kwargs: Arguments of `timm.create_model` for the model.
        images_hash: `fingerprint` of the data set.
        optimizer: Optimizer, whose state is needed to resume.
        history: Metrics of all epochs so far.

    Raises:
        InputError: The files cannot be written; existing files are left unchanged.
    """
    cfg = model.pretrained_cfg
    state = dict(
        epoch=len(history) - 1, arch=cfg['architecture'], state_dict=model.state_dict(),
        optimizer=optimizer.state_dict(),
        args={k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
        metric=history[-1]['eval_metrics']['top1'], version=2, history=history, pictures=images_hash,
        data_config={key: cfg[key] for key in PREPROCESSING if key in cfg})
    try:
        with atomic_dir(args.output) as folder:
            torch.save(state, folder / 'last.pth.tar')
            for row in history:
                update_summary(**row, filename=folder / 'summary.csv', write_header=row is history[0])
            if best_epoch(history) == len(history) - 1:  # moved into place before the state that refers to it
                with atomic_dir(args.output) as best:
                    save_for_hf(
                        model, str(best), {'label_names': cfg['label_names']}, kwargs, safe_serialization=True)
    except (OSError, RuntimeError, SafetensorError) as e:  # PyTorch's writer turns OSError into RuntimeError
        raise InputError(f'nothing could be written to {args.output}; is the disk full? ({e})') from e


def read_state(folder: Path) -> Dict[str, Any]:
    """Read the state that `save_epoch` wrote to a folder.

    Returns:
        A dictionary of `state_dict`, `optimizer`, `history`, `pictures` (the `fingerprint` of the data set), `args` and
        `data_config` (the preprocessing).

    Raises:
        InputError: The folder has no `last.pth.tar`, or the file is damaged.
    """
    path = folder / 'last.pth.tar'
    try:
        state = torch.load(path, map_location='cpu', weights_only=True)
        args = {key: Path(value) if value and key in PATHS else value for key, value in state['args'].items()}
        return {**{key: state[key] for key in ('state_dict', 'optimizer', 'history', 'pictures')},
                'args': args, 'data_config': state.get('data_config', {})}
    except FileNotFoundError as e:
        raise InputError(f'{folder} has no run to resume: it lacks last.pth.tar, which is written after the first '
                         'epoch') from e
    except Exception as e:  # damaged files raise errors of many types
        raise InputError(f'{path} is damaged, or was not written by finetune: {reason(e, 300)}') from e


def fingerprint(data: Data, root: Path) -> str:
    """Return a hash of the paths, relative to `root`, and classes of the training and validation images."""
    names = [[(relative(path, root), target) for path, target in side.samples]
             for side in (data.train, data.val)]
    return hashlib.sha256(repr((names, data.classes)).encode()).hexdigest()
