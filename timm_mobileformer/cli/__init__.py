"""The command timm-mobileformer. Every subcommand is a module here, see `options.parse`."""
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
    """Let Ctrl-C end the process during imports, which would turn it into errors of their own.

    Only the main thread may handle signals, and a handler of the calling program stays.
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
        argv: Its name and arguments; those of the process by default.

    Returns:
        The exit status: 0, 1 where something is left to be desired, 2 where an input cannot be used, 130 after Ctrl-C.
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
    except BrokenPipeError:  # whoever reads, head for one, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (console.InputError, OSError, ModuleNotFoundError) as e:
        status, message = 2, f'error: {console.reason(e)}'
    console.close_bars()
    print(message, file=sys.stderr)
    return status
