"""Who is next: a line for every owner, and the owner that holds the fewest lanes is served first.

So one file over HTTP is not behind the hundred windows of a recording that came before it. It knows no lanes, no
tensors; an owner is whatever hashable the caller says belongs together.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterator, Mapping
from heapq import heapify, heappop, heapreplace
from typing import Generic, TypeVar

T = TypeVar("T")


class FairQueue(Generic[T]):
    """Items in order of arrival within an owner; between owners by what each holds already, the earliest one first.

    `held` is asked for what an owner holds at the moment: the same mapping for a queue's whole life.
    """

    def __init__(self, held: Mapping[Hashable, int]) -> None:
        self._held = held
        self._lines: OrderedDict[Hashable, deque[T]] = OrderedDict()

    def __len__(self) -> int:
        return sum(len(line) for line in self._lines.values())

    def push(self, owner: Hashable, item: T) -> None:
        self._lines.setdefault(owner, deque()).append(item)

    def push_front(self, owner: Hashable, item: T) -> None:
        """Gives an item its place back."""
        self._lines.setdefault(owner, deque()).appendleft(item)

    def pop(self) -> T:
        owner = self._next(self._held)
        line = self._lines[owner]
        item = line.popleft()
        if not line:
            del self._lines[owner]
        return item

    def upcoming(self, weight: Callable[[T], int]) -> Iterator[T]:
        """The items in the order in which they would be popped if each then held `weight(item)`."""
        lines = [
            (self._held.get(owner, 0), place, iter(line)) for place, (owner, line) in enumerate(self._lines.items())
        ]
        heapify(lines)  # by what is held, then by who came first; places differ, so iterators are never compared
        while lines:
            held, place, line = lines[0]
            item = next(line, None)
            if item is None:
                heappop(lines)
                continue
            heapreplace(lines, (held + weight(item), place, line))
            yield item

    def remove(self, owner: Hashable, unwanted: Callable[[T], bool]) -> None:
        line = self._lines.get(owner)
        if line is None:
            return
        kept = deque(item for item in line if not unwanted(item))
        if kept:
            self._lines[owner] = kept
        else:
            del self._lines[owner]

    def clear(self) -> None:
        self._lines.clear()

    def _next(self, held: Mapping[Hashable, int]) -> Hashable:
        return min(self._lines, key=lambda owner: held.get(owner, 0))
