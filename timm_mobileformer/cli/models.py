"""Options of `timm-mobileformer models`."""
import argparse

HELP = 'list the models'
WORK = 'model_table'


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.description = 'List the Mobile-Formers with their size, cost, accuracy in the paper and cached weights.'
