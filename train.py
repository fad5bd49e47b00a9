"""`python train.py [CONFIG] [--section.field value ...]`: train; by default on Python's standard library, with two pages."""

import pathlib
import sys

from transformer.cli.main import run

LOOK_AT = """\
class Stack:
    def __init__(self):
        self.items = []

    def push(self, item):
        self.items.append(item)

    def pop(self):
        return self.items.pop()
"""

if __name__ == "__main__":
    arguments = sys.argv[1:]
    if not arguments or arguments[0].startswith("-"):
        arguments = [str(pathlib.Path(__file__).parent / "configs" / "python_stdlib.py"), *arguments]
        run("train", arguments, look_at=LOOK_AT)
    else:
        run("train", arguments)
