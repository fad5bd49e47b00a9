"""A small Flax linen transformer library and trainer."""
