"""
The key-value cache of attention, for sampling: earlier positions are not computed again.

    cache = [LayerCache(capacity) for _ in range(n_layer)]    # one per block
    model(prompt, cache=cache)                         # fills it
    model(next_ids, cache=cache)                       # reads only the new positions, and adds them

Letters: B rows, H heads, T positions, D head_dim.
"""

from __future__ import annotations


class LayerCache:
    """
    Keys and values of one attention layer, for up to `capacity` positions.

    len(cache) is the number of positions that it holds.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.n = 0
        self.k = None  # (B, H, capacity, D), as self.v
        self.v = None

    def __len__(self) -> int:
        return self.n

    def extend(self, k, v):
        """Add keys and values (B, H, T, D); returns those of all positions so far, the new last."""
        if self.k is None:  # allocated once: joining old and new for each token would copy them all
            B, H, _, D = k.shape
            self.k = k.new_empty(B, H, self.capacity, D)
            self.v = v.new_empty(B, H, self.capacity, D)
        start = self.n
        self.n += k.shape[2]
        self.k[:, :, start : self.n] = k
        self.v[:, :, start : self.n] = v
        return self.k[:, :, : self.n], self.v[:, :, : self.n]
