"""From text to batches: tokenizers, local and TFDS corpora, and the training and evaluation pipelines."""
