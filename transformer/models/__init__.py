"""Encoder, Decoder and EncoderDecoder."""
