"""Options of `timm-mobileformer models`."""
import argparse

HELP = 'list the models'
WORK = 'model_table'


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.description = 'List the Mobile-Formers, their size and cost, the paper\'s accuracy, and where weights are.'
