"""`python train.py [CONFIG] [--section.field value ...]`: train, by default on Python's standard library."""

import pathlib
import sys

from transformer.cli.main import run

if __name__ == "__main__":
    arguments = sys.argv[1:]
    if not arguments or arguments[0].startswith("-"):
        arguments = [str(pathlib.Path(__file__).parent / "configs" / "python_stdlib.py"), *arguments]
    run("train", arguments)
