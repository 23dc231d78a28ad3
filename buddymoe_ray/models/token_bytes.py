"""The bytes of single tokens, for the logprobs of a reply and for grammars.

A token's own bytes differ from `decode([id])`, which drops leading spaces and shows half characters as U+FFFD. Knows
tokenizers, not requests; works from the vocabulary's pieces alone.
"""

from __future__ import annotations

import json
from typing import Any

__all__ = ["TokenBytes"]


class TokenBytes:
    """Token id → bytes, for byte-level BPE, and for SentencePiece with or without byte fallback.

    `tokenizer` is a transformers tokenizer, or None for a checkpoint without one: then every token has no bytes.
    """

    def __init__(self, tokenizer: Any | None) -> None:
        self._tokenizer = tokenizer
        self._literal: dict[int, Any] = {} if tokenizer is None else dict(tokenizer.added_tokens_decoder)
        self._byte_of = _byte_alphabet() if _is_byte_level(tokenizer) else None
        self._known: dict[int, bytes] = {}

    def __call__(self, token_id: int) -> bytes:
        """The token's bytes; empty when the vocabulary has no such id."""
        data = self._known.get(token_id)
        if data is None:
            data = self._known[token_id] = self._look_up(token_id)
        return data

    def _look_up(self, token_id: int) -> bytes:
        if self._tokenizer is None:
            return b""
        if token_id in self._literal:
            return str(self._literal[token_id]).encode()
        if token_id >= len(self._tokenizer):
            return b""
        piece = self._tokenizer.convert_ids_to_tokens(token_id)
        if not isinstance(piece, str):
            return b""
        if self._byte_of is not None:
            return b"".join(bytes([self._byte_of[c]]) if c in self._byte_of else c.encode() for c in piece)
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        return piece.replace("▁", " ").encode()


def _is_byte_level(tokenizer: Any | None) -> bool:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = getattr(backend, "decoder", None)
    if decoder is None:
        return False
    state = json.loads(decoder.__getstate__())
    return any(part["type"] == "ByteLevel" for part in state.get("decoders", [state]))


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes: printable Latin-1 stands for itself, the rest follows from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + at): byte for at, byte in enumerate(others)}
