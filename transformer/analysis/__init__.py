"""Analysis of models and runs: attention weights, statistics of heads, and pages of both."""
