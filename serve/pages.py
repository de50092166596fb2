"""Which cache pages are free, who holds which, and which hold the beginning of a known text.

One page has a token's target rows and its draft's keys and values alike, so a page found again is
whole for both. Page 0 is nobody's.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np


class Pages:
    """Counts the holders of every page; what nobody holds stays findable until it is needed."""

    def __init__(self, count: int, size: int, caching: bool = True):
        self.count, self.size, self.caching = count, size, caching
        self._free = list(range(count - 1, 0, -1))
        self._holders: dict[int, int] = {}
        self._page_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()
        """Findable pages that nobody holds, the longest unused first."""

    @property
    def available(self) -> int:
        """How many pages can be taken."""
        return len(self._free) + len(self._idle)

    @property
    def usage(self) -> float:
        """Share of the pages that someone holds."""
        return len(self._holders) / max(self.count - 1, 1)

    def find(self, tokens: Sequence[int], salt: str) -> list[int]:
        """Pages with the longest known beginning of these tokens, now held; whole pages only."""
        found: list[int] = []
        for key in self._keys(tokens, salt) if self.caching else ():
            page = self._page_of.get(key)
            if page is None:
                break
            found.append(page)
        for page in found:
            self._hold(page)
        return found

    def take(self, count: int) -> list[int] | None:
        """So many pages of unknown content, now held; None, and nothing taken, if there are not."""
        if count > self.available:
            return None
        taken = []
        for _ in range(count):
            if not self._free:
                page, _ = self._idle.popitem(last=False)
                self._forget(page)
                self._free.append(page)
            taken.append(self._free.pop())
            self._hold(taken[-1])
        return taken

    def publish(self, pages: Sequence[int], tokens: Sequence[int], salt: str) -> None:
        """Make held pages findable as the beginning of these tokens, whose rows they hold.

        Another page that is already known by the same tokens stays the one that is found.
        """
        if not self.caching:
            return
        for page, key in zip(pages, self._keys(tokens, salt), strict=False):
            if key not in self._page_of and page not in self._key_of:
                self._page_of[key], self._key_of[page] = page, key

    def release(self, pages: Sequence[int]) -> None:
        """Let go of held pages; the end of a text is forgotten before its beginning."""
        for page in reversed(pages):
            self._holders[page] -= 1
            if self._holders[page]:
                continue
            del self._holders[page]
            if page in self._key_of:
                self._idle[page] = None
            else:
                self._free.append(page)

    def withdraw(self, pages: Sequence[int]) -> None:
        """Make held pages unfindable: what they hold is not to be trusted."""
        for page in pages:
            self._forget(page)

    def alone(self, pages: Sequence[int]) -> list[int]:
        """Those of some held pages that nobody else holds."""
        return [page for page in pages if self._holders[page] == 1]

    def _hold(self, page: int) -> None:
        self._idle.pop(page, None)
        self._holders[page] = self._holders.get(page, 0) + 1

    def _forget(self, page: int) -> None:
        key = self._key_of.pop(page, None)
        if key is not None:
            del self._page_of[key]

    def _keys(self, tokens: Sequence[int], salt: str) -> list[bytes]:
        """A digest of everything up to the end of each whole page."""
        keys, parent = [], hashlib.blake2b(salt.encode(), digest_size=16).digest()
        for start in range(0, len(tokens) - self.size + 1, self.size):
            piece = np.asarray(tokens[start : start + self.size], np.int32).tobytes()
            parent = hashlib.blake2b(parent + piece, digest_size=16).digest()
            keys.append(parent)
        return keys
