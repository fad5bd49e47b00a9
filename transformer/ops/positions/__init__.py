"""Position kinds, one per file."""
