"""Text to bytes and back, as ids: what tiktoken does for a vocabulary without merges."""

from __future__ import annotations

import re

import numpy as np


class ByteEncoding:
    """
    The part of tiktoken.Encoding that `Tokenizer` uses, for tokens of one byte each.

    ranks: {byte: id}; special: {text: id}. Needs no package and is as fast as a table look-up.
    """

    def __init__(self, ranks: dict[bytes, int], special: dict[str, int]):
        self.n_vocab = len(ranks) + len(special)
        self.special = special
        self.bytes_of = {i: token for token, i in ranks.items()}
        self.bytes_of |= {i: text.encode() for text, i in special.items()}
        self.id_of_byte = np.array([ranks[bytes([b])] for b in range(256)], dtype=np.uint32)

    def encode_to_numpy(self, text: str, allowed_special, disallowed_special=()) -> np.ndarray:
        """
        Ids (T,) uint32; the special tokens in `allowed_special` are one id each, others are text.

        Raises UnicodeEncodeError for lone surrogates.
        """
        special = [re.escape(token) for token in self.special if token in allowed_special]
        # with a group, the pieces at odd positions are the special tokens
        pieces = re.split(f"({'|'.join(special)})", text) if special else [text]
        ids = [np.zeros(0, dtype=np.uint32)]
        for i, piece in enumerate(pieces):
            if i % 2:
                ids.append(np.array([self.special[piece]], dtype=np.uint32))
            else:
                ids.append(self.id_of_byte[np.frombuffer(piece.encode(), dtype=np.uint8)])
        return np.concatenate(ids)

    def decode_bytes(self, ids) -> bytes:
        """The bytes of a list of ids. Raises KeyError for an unknown one."""
        return b"".join(self.bytes_of[i] for i in ids)
