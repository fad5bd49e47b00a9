"""Looking into a model: attention weights, and what heads do with them."""
