"""From text to batches: sources, tokenizers, and the Grain pipeline."""
