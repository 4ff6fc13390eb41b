"""The binary search that every level of a bisection uses, with its evaluations counted."""

from __future__ import annotations

from collections.abc import Callable, Mapping


class Search:
    """Finds the first bad position of 0 … `count`, where position 0 is what is trusted and `count` what is suspected.

    At most ⌈log2 count⌉ + 2 evaluations: both ends once, and one for each halving. No position is evaluated twice. One more is left to the
    caller, who confirms what was found.

    Args:
        count: The last position, at least 1.
        is_bad: Whether a position is bad. It is taken to be monotone: what follows a bad position is bad.
        known: What is known of positions already.
    """

    def __init__(self, count: int, is_bad: Callable[[int], bool], known: Mapping[int, bool] | None = None) -> None:
        if count < 1:
            raise ValueError(f"there is nothing to search: {count} positions")
        self.count = count
        self.evaluations = 0
        self._is_bad = is_bad
        self._known = dict(known or {})

    @property
    def bound(self) -> int:
        """⌈log2 count⌉ + 3, the most evaluations that a level may take with its confirmation."""
        return (self.count - 1).bit_length() + 3

    def bad(self, position: int) -> bool:
        """Whether a position is bad, evaluated at the first time only."""
        if position not in self._known:
            self.evaluations += 1
            self._known[position] = self._is_bad(position)
        return self._known[position]

    def first_bad(self) -> int | None:
        """The first bad position; 0: even what is trusted is bad; None: the last one is good."""
        if not self.bad(self.count):
            return None
        if self.bad(0):
            return 0
        low, high = 0, self.count
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.bad(middle) else (middle, high)
        assert self.evaluations < self.bound
        return high


def first_bad(count: int, is_bad: Callable[[int], bool], known: Mapping[int, bool] | None = None) -> int | None:
    """The first bad position of 0 … `count` (see `Search`)."""
    return Search(count, is_bad, known).first_bad()
