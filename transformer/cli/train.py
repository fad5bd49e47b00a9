"""`transformer train CONFIG`: train a model, or go on with an interrupted run."""

from transformer import build
from transformer.cli.arguments import parse_config


def main(arguments: list[str]) -> None:
    """Train the config that the arguments describe."""
    build.train(parse_config(arguments, command="transformer train"))
