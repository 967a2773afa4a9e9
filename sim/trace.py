"""What happened, as a hash: two runs with the same one took the same steps at the same moments."""

import hashlib
import struct

ENDED, KILLED, HUNG, PUBLISHED, LOOKED_UP = -1, -2, -3, -4, -5
"""What can happen besides a frame, which is noted by its size."""

_BUFFER_BYTES = 65_536
_pack = struct.Struct("<dIIi").pack


class Trace:
    """A hash over everything that was sent and broken, and when: two runs with the same one took the same steps."""

    def __init__(self) -> None:
        self.frames = 0
        self._hash = hashlib.blake2b(digest_size=8)
        self._waiting = bytearray()

    def note(self, moment: float, who: int, whom: int, what: int) -> None:
        """Something happened; `what` is the size of a frame, or one of the words above."""
        self.frames += 1
        self._waiting += _pack(moment, who, whom, what)
        if len(self._waiting) > _BUFFER_BYTES:
            self._hash.update(self._waiting)
            self._waiting.clear()

    @property
    def digest(self) -> str:
        """The hash so far."""
        self._hash.update(self._waiting)
        self._waiting.clear()
        return self._hash.hexdigest()
