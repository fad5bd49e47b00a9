"""`transformer train CONFIG`: train a model, or go on with an interrupted run."""

from transformer.cli.arguments import parse_config
from transformer.parallel import distributed
from transformer.runs.train import train


def main(arguments: list[str]) -> None:
    """Train the config that the arguments describe."""
    config = parse_config(arguments, command="transformer train")
    if not distributed.start(config.parallel):
        train(config)
        return
    with distributed.leaving():
        train(config)
