"""The oldest timm that the models and the commands need; pyproject.toml asks pip for the same."""
import re

__all__ = ['COMMANDS', 'MODELS', 'is_older']

MODELS, COMMANDS = '1.0.3', '1.0.29'


def is_older(version: str, than: str) -> bool:
    """Whether one version comes before another by its first three numbers."""
    first, second = (tuple(map(int, re.findall(r'\d+', v)[:3])) for v in (version, than))
    return first < second
