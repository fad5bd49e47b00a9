"""Tiny pretrained tokenizers of each kind, made with the `tokenizers` library, in folders as Hugging Face lays them out."""

import json

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = ["the café is open\n", "a naïve  café, the end.\t1234", "héllo wörld 😀 <tool> 日本語"] * 4
TEXTS = [
    "the café\n",
    "😀 emoji 👩‍👩‍👧",
    "\ttabs\tand  runs   of    spaces",
    "nul\0byte",
    "日本語 text\r\n",
    "a<tool>b",
    "e\u0301 \u200b",
    "the end",
    ".",
]


def train(model, trainer, **special):
    tokenizer = tokenizers.Tokenizer(model)
    for name, part in special.items():
        setattr(tokenizer, name, part)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def byte_level(prefix=False):
    """As GPT-2's and Llama 3's."""
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    level = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer = train(models.BPE(), trainer, pre_tokenizer=level, decoder=decoders.ByteLevel())
    tokenizer.add_special_tokens(["<s>", "</s>", "<|turn|>"])
    tokenizer.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    return tokenizer


def llama(scheme="normalizer"):
    """Byte fallback, spaces as `▁`, one put before each text, as Llama 2's."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "t", "h", "e", "th", "the", "▁the", "c", "a", "f", "é", "n", "d", ".", "日", "▁▁"]
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("▁", "▁")]
    model = models.BPE(
        vocab={piece: i for i, piece in enumerate(pieces)},
        merges=merges,
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = tokenizers.Tokenizer(model)
    if scheme == "normalizer":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
    ends = [decoders.Strip(" ", 1, 0)] if scheme != "never" else []
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *ends])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1)])
    return tokenizer


def bert():
    """Lower-case pieces of words between [CLS] and [SEP], with padding and truncation asked for."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = train(
        models.WordPiece(unk_token="[UNK]"),
        trainers.WordPieceTrainer(vocab_size=120, special_tokens=special, show_progress=False),
        normalizer=normalizers.BertNormalizer(lowercase=True),
        pre_tokenizer=pre_tokenizers.BertPreTokenizer(),
        decoder=decoders.WordPiece(),
    )
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.enable_padding(length=16)
    tokenizer.enable_truncation(8)
    return tokenizer


def t5():
    """A unigram model whose special tokens are pieces too, as T5's."""
    special = ["<pad>", "</s>", "<unk>", "<extra_id_0>", "<extra_id_1>"]
    tokenizer = train(
        models.Unigram(),
        trainers.UnigramTrainer(vocab_size=90, special_tokens=special, unk_token="<unk>", show_progress=False),
        normalizer=normalizers.NFKC(),
        pre_tokenizer=pre_tokenizers.Metaspace(),
        decoder=decoders.Metaspace(),
    )
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", "$A </s> $B </s>", [("</s>", 1)])
    return tokenizer


def folder(path, tokenizer, named=None, **files):
    """Write a folder of a pretrained model; `files` are others, by name without their ending."""
    path.mkdir(parents=True, exist_ok=True)
    # Other white space than the library writes: only the file's own bytes may be kept.
    content = json.dumps(json.loads(tokenizer.to_str()), indent=3, ensure_ascii=True)
    (path / "tokenizer.json").write_bytes(content.encode().replace(b"\n", b"\r\n"))
    for name, fields in {"tokenizer_config": named, **files}.items():
        if fields is not None:
            (path / f"{name}.json").write_text(json.dumps(fields))
    return path


LLAMA_CONFIG = {
    "bos_token": "<s>",
    "eos_token": {"__type": "AddedToken", "content": "</s>", "lstrip": False},
    "unk_token": "<unk>",
}
BERT_CONFIG = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "mask_token": "[MASK]"}
FOLDERS = {
    "gpt2": (byte_level, {"eos_token": "</s>", "bos_token": "</s>"}),
    "prefixed": (lambda: byte_level(prefix=True), {"eos_token": "</s>"}),
    "llama": (llama, LLAMA_CONFIG),
    "metaspace": (lambda: llama("first"), LLAMA_CONFIG),
    "gemma": (lambda: llama("never"), LLAMA_CONFIG),
    "bert": (bert, BERT_CONFIG),
    "t5": (t5, {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}),
}


def make_folder(path, name):
    """The folder of one of `FOLDERS`."""
    make, config = FOLDERS[name]
    return folder(path / name, make(), config)
