"""Pure functions on arrays: attention, masks, positions, losses."""
