"""`python3 -m tests.benchmarks`: see speed.py."""

import sys

import tyro

from tests.benchmarks.speed import Arguments, main

if __name__ == "__main__":  # MiniGrid's processes import this file again
    sys.exit(main(tyro.cli(Arguments, prog="python3 -m tests.benchmarks")))
