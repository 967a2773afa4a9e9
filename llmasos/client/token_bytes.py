"""The bytes that a token stands for, which its text alone does not tell when it is part of a character."""

from collections.abc import Sequence
from typing import Any

from llmasos.client.text import Detokenizer


class TokenBytes:
    """Knows the two ways in which tokenizers write bytes: a character each (GPT-2), or `<0x0A>` and `▁` for a space."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._added = {str(token) for token in tokenizer.get_added_vocab()}
        decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
        self._byte_of = _byte_of_character() if "ByteLevel" in repr(decoder) else None

    def __call__(self, token: int) -> bytes:
        """The bytes of one token; of a special one, its name."""
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if not isinstance(piece, str):
            return b""  # beyond the tokenizer's own vocabulary: models pad theirs
        if piece in self._added:
            return piece.encode()
        if self._byte_of is not None:
            return b"".join(self._byte_of.get(character) or character.encode() for character in piece)
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        return piece.replace("▁", " ").encode()


def offsets_of(tokenizer: Any, ids: Sequence[int]) -> list[int]:
    """Where the text of each token begins in the text of them all, in characters."""
    detokenizer, offsets, length = Detokenizer(tokenizer, []), [], 0
    for token in ids:
        offsets.append(length)
        length += len(detokenizer.add(token))
    return offsets


def _byte_of_character() -> dict[str, bytes]:
    """The table of GPT-2: printable bytes are themselves, the others are moved up behind 255."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): bytes([byte]) for byte in printable}
    return table | {chr(256 + index): bytes([byte]) for index, byte in enumerate(others)}
