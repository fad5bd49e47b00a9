"""Linen models: Decoder, Encoder, EncoderDecoder, Classifier and Embedder."""
