"""From a config to its parts, a run in its directory, and a saved run opened again."""
