"""Export of a run's tokenizer as the files of a Hugging Face folder."""

import json
from collections.abc import Mapping
from typing import Any

import tokenizers

from transformer.data.tokenizers.base import END_OF_TEXT, Tokenizer
from transformer.data.tokenizers.bytes import ByteTokenizer
from transformer.data.tokenizers.library import LibraryTokenizer
from transformer.tokenizer import FILE_NAME, prompt_start, stop_ids, target_start

_CONFIG, _GENERATION = "tokenizer_config.json", "generation_config.json"


def class_words(class_names: tuple[str, ...]) -> dict[str, Any]:
    """The keys of a config.json that name the classes of a classifier."""
    if not class_names:
        return {}
    numbered = list(enumerate(class_names))
    return {"id2label": {str(n): name for n, name in numbered}, "label2id": {name: n for n, name in numbered}}


def generation_texts(tokenizer: Tokenizer, kept: Mapping[str, str]) -> dict[str, str]:
    """The file with the start and stop ids of generation, unless an import kept one."""
    stops = list(stop_ids(tokenizer))
    values = {"eos_token_id": stops[0] if len(stops) == 1 else stops, "decoder_start_token_id": target_start(tokenizer)}
    return {} if _GENERATION in kept else {_GENERATION: json.dumps(values, indent=2)}


def tokenizer_texts(tokenizer: Tokenizer, kept: Mapping[str, str]) -> dict[str, str]:
    """The files of a tokenizer, name -> content; files kept by an import are unchanged.

    A tokenizer of this package is written such that a prompt also begins with end-of-text in transformers. A tokenizer without
    an equivalent in the `tokenizers` library is left out.
    """
    content = getattr(tokenizer, "content", b"")
    if content:
        return {FILE_NAME: content.decode()}
    files = _written(tokenizer) if isinstance(tokenizer, ByteTokenizer | LibraryTokenizer) else {}
    return {name: text for name, text in files.items() if name not in kept}


def _written(tokenizer: Any) -> dict[str, str]:
    model = (
        _bytes_model() if isinstance(tokenizer, ByteTokenizer) else tokenizers.Tokenizer.from_str(tokenizer.to_json())
    )
    start = [(END_OF_TEXT, index) for index in prompt_start(tokenizer)]
    model.post_processor = tokenizers.processors.TemplateProcessing(
        f"{END_OF_TEXT} $A", f"{END_OF_TEXT} $A {END_OF_TEXT} $B", start
    )
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_TEXT, "bos_token": END_OF_TEXT}
    return {FILE_NAME: model.to_str(), _CONFIG: json.dumps(config, indent=2)}


def _bytes_model() -> tokenizers.Tokenizer:
    """The byte tokenizer in the library's terms: byte pairs without merges, then end-of-text."""
    alphabet = _alphabet()
    model = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={c: b for b, c in enumerate(alphabet)}, merges=[]))
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    model.add_special_tokens([END_OF_TEXT])
    return model


def _alphabet() -> list[str]:
    """The character that stands for each byte (GPT-2): itself if printable, else a code point from 256."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in seen else chr(next(others)) for byte in range(256)]
