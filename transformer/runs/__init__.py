"""Building a run from a config, training it in its directory, and opening a saved run."""
