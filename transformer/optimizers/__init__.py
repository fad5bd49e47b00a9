"""Update rules, one file a rule."""
