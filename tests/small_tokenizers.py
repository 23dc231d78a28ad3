"""Real tokenizers small enough to make in a test, one for each way of spelling text: byte-level BPE trained on a little
text, sentencepiece-like words with spaces inside tokens (Metaspace), and the like with byte fallback, as Mixtral has.

Each is built once per process.
"""

from __future__ import annotations

from functools import cache

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

__all__ = ["SPECIALS", "TEXT", "bpe", "byte_fallback", "metaspace"]

SPECIALS = ["<|end|>", "<|im_start|>", "<|im_end|>"]
TEXT = (
    "The quick brown fox jumps over the lazy dog. Experts are loaded from the disk when they are needed.\n"
    "Ünïcödé äöü ß éèê, naïve café; ¿qué? ñandú. Привет, мир! Γειά σου κόσμε. שלום עולם. مرحبا بالعالم.\n"
    "你好，世界。今天天气很好。日本語のテキストです。한국어 문장입니다. สวัสดีชาวโลก नमस्ते दुनिया\n"
    "🙂🚀 👩‍👩‍👧‍👦 🇩🇪 e\u0301 a\u0308 👍🏽 def f(x):\n    return x + 1  # indented\n\t\ttabs\r\n"
)


@cache
def bpe() -> PreTrainedTokenizerFast:
    """Byte-level BPE: characters beyond the commonest are spread over two to four tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=SPECIALS[0], extra_special_tokens=SPECIALS[1:])


@cache
def metaspace() -> PreTrainedTokenizerFast:
    """Unigram over Metaspace: a token's space goes before it, and the first token of a text has none."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<unk>", *SPECIALS], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(TEXT.splitlines() * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token=SPECIALS[0])


@cache
def byte_fallback() -> PreTrainedTokenizerFast:
    """BPE with U+2581 for spaces; characters outside the vocabulary (all but ASCII) become one token per byte."""
    ascii_text = "".join(c for c in TEXT if c.isascii() and c.isprintable())
    words = ascii_text.replace(" ", "\u2581")
    vocab = {"<unk>": 0, **{name: at + 1 for at, name in enumerate(SPECIALS)}}
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    for letter in sorted(set(words) | set("etaoins")):
        vocab[letter] = len(vocab)
    merges = [("\u2581", "t"), ("h", "e"), ("\u2581t", "he"), ("\u2581", "\u2581"), ("e", "r"), ("o", "v")]
    for left, right in merges:
        vocab[left + right] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(Regex(" "), "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", *SPECIALS])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token=SPECIALS[0])
