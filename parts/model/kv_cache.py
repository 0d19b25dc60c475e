"""The keys and values of one layer, kept while a model samples."""

from __future__ import annotations


class LayerCache:
    """For sampling (read CausalSelfAttention first): keys and values, (B, H, T, D), of the positions seen; room for `capacity`."""

    def __init__(self, capacity: int):
        self.capacity, self.n, self.k, self.v = capacity, 0, None, None

    def __len__(self) -> int:
        return self.n

    def extend(self, k, v):
        """All keys and values up to now, the new ones last."""
        if (
            self.k is None
        ):  # taken once: to join old and new for every token would copy them all each time
            B, H, _, D = k.shape
            self.k, self.v = (
                k.new_empty(B, H, self.capacity, D),
                v.new_empty(B, H, self.capacity, D),
            )
        start, self.n = self.n, self.n + k.shape[2]
        self.k[:, :, start : self.n], self.v[:, :, start : self.n] = k, v
        return self.k[:, :, : self.n], self.v[:, :, : self.n]
