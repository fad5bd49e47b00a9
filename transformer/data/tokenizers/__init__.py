"""Tokenizers, one file per kind; `transformer.tokenizer` finds them by name."""

from transformer.data.tokenizers.base import END_OF_TEXT as END_OF_TEXT
from transformer.data.tokenizers.base import PairTokenizer as PairTokenizer
from transformer.data.tokenizers.base import Tokenizer as Tokenizer
from transformer.data.tokenizers.base import Vocabulary as Vocabulary
from transformer.data.tokenizers.base import describe_entries as describe_entries
from transformer.data.tokenizers.base import load_tokenizer as load_tokenizer
from transformer.data.tokenizers.base import note_unknown as note_unknown
from transformer.data.tokenizers.base import source_tokenizer as source_tokenizer
