"""Minimum timm versions of the models and the commands, as in pyproject.toml."""
import re

__all__ = ['COMMANDS', 'MODELS', 'is_older']

MODELS, COMMANDS = '1.0.3', '1.0.29'


def is_older(version: str, than: str) -> bool:
    """Return whether a version is older than another, comparing their first three numbers."""
    first, second = (tuple(map(int, re.findall(r'\d+', v)[:3])) for v in (version, than))
    return first < second
