"""Learning-rate schedules, one file a schedule."""
