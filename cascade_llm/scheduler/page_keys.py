"""The keys of full pages: each a digest of the page's token ids and of the key before it.

Equal keys mean equal text from the beginning on, under equal salts. A collision costs a miss: who finds a page by its
key compares the token ids too.
"""

from __future__ import annotations

import hashlib
from array import array

import xxhash

__all__ = ["PageKeys", "next_page_key", "root_key"]


def root_key(*salts: bytes) -> bytes:
    """The key before the first page, from what names model, adapter and tenant: BLAKE2b-128 of the salts' BLAKE2b-128.

    Each salt is digested by itself, so that different lists of salts never spell the same bytes. A client may choose a
    salt: this digest, unlike the keys' own, lets nobody find one that leads to another's pages.
    """
    return _digest(b"".join(map(_digest, salts)))


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def next_page_key(parent_key: bytes, token_ids: array[int]) -> bytes:
    """xxh3-128 of the parent's key and the page's token ids as little-endian int32: 16 bytes.

    The salt is in the chain through `root_key`.
    """
    return xxhash.xxh3_128_digest(parent_key + token_ids.tobytes())


class PageKeys:
    """The keys of a sequence's full pages, each computed once and only when it is first asked for."""

    __slots__ = ("_keys", "_page_size", "_root_key", "_token_ids", "owner")

    def __init__(self, root_key: bytes, token_ids: array[int], page_size: int, owner: str = "") -> None:
        """Keep what keys are made of.

        Args:
            root_key: the key before the first page; other owners have others
            token_ids: the sequence's own, growing array; only its full pages are read
            page_size: tokens per page
            owner: the tenant whose pages they are
        """
        self.owner = owner
        self._root_key = root_key
        self._token_ids = token_ids
        self._page_size = page_size
        self._keys: list[bytes] = []

    def key(self, page: int) -> bytes:
        """The key of full page `page` of the sequence."""
        keys, size = self._keys, self._page_size
        if page >= len(keys):
            assert (page + 1) * size <= len(self._token_ids), f"page {page} is not full yet"
            width = size * self._token_ids.itemsize
            missing = self._token_ids[len(keys) * size : (page + 1) * size].tobytes()
            key = keys[-1] if keys else self._root_key
            for start in range(0, len(missing), width):
                key = xxhash.xxh3_128_digest(key + missing[start : start + width])
                keys.append(key)
        return keys[page]
