"""The command timm-mobileformer. Every subcommand is a module here, see `options.parse`."""
import io
import os
import signal
import sys
from importlib import import_module
from typing import Any, NoReturn, Optional, Sequence

__all__ = ['main']


def _stop_at_once(*_: Any) -> NoReturn:
    """What Ctrl-C does during imports, which would turn it into errors of their own."""
    os.write(2, b'interrupted\n')
    os._exit(130)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run a subcommand.

    Args:
        argv: Its name and arguments; those of the process by default.

    Returns:
        The exit status: 0, 1 where something is left to be desired, 2 where an input cannot be used, 130 after Ctrl-C.
    """
    on_interrupt = signal.getsignal(signal.SIGINT)
    if on_interrupt is signal.default_int_handler:
        signal.signal(signal.SIGINT, _stop_at_once)
    from . import console, options

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors='replace', line_buffering=True)
    try:
        args = options.parse(argv)
        work = import_module(f'.{args.subcommand}', __name__).WORK
        run = import_module(f'.{work}', __name__).run
        signal.signal(signal.SIGINT, on_interrupt)
        return run(args) or 0
    except KeyboardInterrupt as e:
        status, message = 130, f'interrupted{e}'
    except BrokenPipeError:  # whoever reads, head for one, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (console.InputError, OSError, ModuleNotFoundError) as e:
        status, message = 2, f'error: {console.reason(e)}'
    finally:
        signal.signal(signal.SIGINT, on_interrupt)
    console.close_bars()
    print(message, file=sys.stderr)
    return status
