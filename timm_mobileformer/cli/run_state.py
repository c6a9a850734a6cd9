"""State of a fine-tuning run: what is written after every epoch and read to resume, and who may write."""
import argparse
import hashlib
import shutil
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
from .files import atomic_dir
from .folders import relative
from .report import History, best_epoch

__all__ = ['check_is_free', 'claim', 'fingerprint', 'read_state', 'save_epoch']

PATHS = 'data_dir', 'labels', 'checkpoint'  # options that are paths


@contextmanager
def claim(folder: Path) -> Iterator[None]:
    """Reserve an output folder, which is created if needed, for this process.

    The claim is a file lock: the operating system releases it however the process ends.

    Raises:
        InputError: Another process has claimed the folder, or it cannot be written to.
    """
    is_new = not folder.exists()
    lock = FileLock(folder / '.lock')
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as e:
        raise InputError(f'another run is writing to {folder}; name another folder with --output') from e
    except FileExistsError as e:
        raise InputError(f'{folder} is a file; name a folder with --output') from e
    except OSError as e:
        raise InputError(f'{folder} cannot be written to ({e.strerror}); name another with --output') from e
    for unfinished in folder.glob('.*.unfinished'):  # by a run that was killed while it wrote
        shutil.rmtree(unfinished)
    try:
        yield
    finally:
        (folder / '.lock').unlink(missing_ok=True)
        lock.release()
        if is_new and not any(folder.iterdir()):
            folder.rmdir()


def check_is_free(folder: Path) -> None:
    """Refuse a folder that holds more than a run leaves that ended before its first epoch.

    Raises:
        InputError: It does.
    """
    if any(not path.name.startswith('.') and path.name != BAD_IMAGES for path in folder.iterdir()):
        raise InputError(f'{folder} is not empty; name a new folder with --output, remove it, or continue the run in '
                         f'it with --resume {quote(folder)}')


def save_epoch(args: argparse.Namespace, model: Any, kwargs: Dict[str, Any], pictures: str, optimizer: Any,
               history: History) -> None:
    """Write the state after an epoch to `args.output`, and the weights if the epoch is the best so far.

    Args:
        args: Options of the run.
        model: Its `pretrained_cfg` names the classes.
        kwargs: Arguments with which `timm.create_model` makes the model.
        pictures: `fingerprint` of the images.
        optimizer: Its state is needed to resume.
        history: Metrics of all epochs, this one last.

    Raises:
        InputError: They cannot be written; what was there stays.
    """
    cfg = model.pretrained_cfg
    state = dict(
        epoch=len(history) - 1, arch=cfg['architecture'], state_dict=model.state_dict(),
        optimizer=optimizer.state_dict(),
        args={k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
        metric=history[-1]['eval_metrics']['top1'], version=2, history=history, pictures=pictures)
    try:
        with atomic_dir(args.output) as folder:
            torch.save(state, folder / 'last.pth.tar')
            for row in history:
                update_summary(**row, filename=folder / 'summary.csv', write_header=row is history[0])
            if best_epoch(history) == len(history) - 1:  # in place before the state that refers to it
                with atomic_dir(args.output) as best:
                    save_for_hf(
                        model, str(best), {'label_names': cfg['label_names']}, kwargs, safe_serialization=True)
    except (OSError, RuntimeError, SafetensorError) as e:  # PyTorch's writer makes the second of the first
        raise InputError(f'nothing could be written to {args.output}; is the disk full? ({e})') from e


def read_state(folder: Path) -> Dict[str, Any]:
    """Read what `save_epoch` wrote to a folder: state_dict, optimizer, history, pictures and args.

    Raises:
        InputError: There is no such file, or it is damaged.
    """
    path = folder / 'last.pth.tar'
    try:
        state = torch.load(path, map_location='cpu', weights_only=True)
        args = {key: Path(value) if value and key in PATHS else value for key, value in state['args'].items()}
        return {**{key: state[key] for key in ('state_dict', 'optimizer', 'history', 'pictures')}, 'args': args}
    except FileNotFoundError as e:
        raise InputError(f'no run to go on with in {folder}: it has no last.pth.tar, which is written after the first '
                         'epoch') from e
    except Exception as e:  # a damaged or foreign file fails in many ways
        raise InputError(f'{path} is not what finetune writes, or damaged: {reason(e, 300)}') from e


def fingerprint(data: Data, root: Path) -> str:
    """Hash of the names, relative to `root`, and classes of all images."""
    names = [[(relative(path, root), target) for path, target in side.samples]
             for side in (data.train, data.val)]
    return hashlib.sha256(repr((names, data.classes)).encode()).hexdigest()
