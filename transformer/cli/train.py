"""`transformer train CONFIG`: train a model, or go on with an interrupted run."""

from transformer.config import Config
from transformer.parallel import distributed
from transformer.runs.train import train


def main(config: Config) -> None:
    """Train the config that the arguments describe."""
    if not distributed.start(config.parallel):
        train(config)
        return
    with distributed.leaving():
        train(config)
