"""The command `timm-mobileformer`. For the structure of subcommands, see `options.parse`."""
import io
import os
import signal
import sys
import threading
from contextlib import contextmanager
from importlib import import_module
from typing import Any, Iterator, NoReturn, Optional, Sequence

__all__ = ['main']


def _stop_at_once(*_: Any) -> NoReturn:
    os.write(2, b'interrupted\n')
    os._exit(130)


@contextmanager
def _stopping_at_once() -> Iterator[None]:
    """Make Ctrl-C exit at once during imports, in which a KeyboardInterrupt may be turned into other errors.

    Nothing changes outside the main thread, or if the calling program has its own signal handler.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, _stop_at_once)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run a subcommand.

    Args:
        argv: Name and arguments of the subcommand, by default those of the process.

    Returns:
        The exit status: 0 on success, 1 on partial failure, 2 on an error, 130 after Ctrl-C.
    """
    with _stopping_at_once():
        from . import console, options

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors='replace', line_buffering=True)
    try:
        with _stopping_at_once():
            args = options.parse(argv)
            work = import_module(f'.{args.subcommand}', __name__).WORK
            run = import_module(f'.{work}', __name__).run
        return run(args) or 0
    except KeyboardInterrupt as e:
        status, message = 130, f'interrupted{e}'
    except BrokenPipeError:  # the reader, such as head, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (console.InputError, OSError, ModuleNotFoundError) as e:
        status, message = 2, f'error: {console.reason(e)}'
    console.close_bars()
    print(message, file=sys.stderr)
    return status
