"""Writers to trackers of experiments."""
