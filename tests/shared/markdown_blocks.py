"""Fenced blocks of Markdown."""

import re


def fenced_blocks(text):
    """The language of each block, which may be empty, and its text."""
    return re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S)
