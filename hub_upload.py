#!/usr/bin/env python3
"""Publish weights of a Mobile-Former on the Hugging Face Hub: `timm-mobileformer publish`, with the same arguments."""
import sys

from timm_mobileformer.cli import main

if __name__ == '__main__':
    sys.exit(main(['publish', *sys.argv[1:]]))
