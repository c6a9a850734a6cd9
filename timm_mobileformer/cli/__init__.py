"""The command timm-mobileformer."""
import importlib
import sys
from typing import Optional, Sequence

from . import options
from .terminal import InputError

__all__ = ['main']


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run a subcommand; returns the exit status."""
    sys.stdout.reconfigure(errors='replace', line_buffering=True)  # type: ignore[union-attr]
    try:
        args = options.parse(argv)
        return importlib.import_module(f'.{args.subcommand}', __package__).run(args) or 0
    except KeyboardInterrupt as e:
        print(f'interrupted{e}', file=sys.stderr)
        return 130
    except (InputError, ModuleNotFoundError, OSError) as e:
        print(f'error: {e}', file=sys.stderr)
        return 2
