"""Who is served next."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable

from pipeline.engine.fairness import FairQueue


def test_the_owner_that_holds_least_is_next() -> None:
    held: Counter[Hashable] = Counter()
    queue: FairQueue[str] = FairQueue(held)
    for i in range(5):
        queue.push("bulk", f"bulk {i}")
    queue.push("call", "call 0")
    served = []
    while len(queue):
        item = queue.pop()
        served.append(item)
        held[item.split()[0]] += 1
    assert served == ["bulk 0", "call 0", "bulk 1", "bulk 2", "bulk 3", "bulk 4"]


def test_what_is_upcoming_is_what_is_popped() -> None:
    held: Counter[Hashable] = Counter({"a": 2})
    queue: FairQueue[tuple[str, int]] = FairQueue(held)
    for owner, weight in [("a", 1), ("a", 1), ("b", 5), ("b", 1), ("c", 1), ("c", 1), ("c", 1)]:
        queue.push(owner, (owner, weight))
    announced = list(queue.upcoming(lambda item: item[1]))
    popped = []
    while len(queue):
        owner, weight = queue.pop()
        held[owner] += weight
        popped.append((owner, weight))
    assert announced == popped


def test_a_place_given_back_and_a_line_given_up() -> None:
    queue: FairQueue[int] = FairQueue({})
    for i in range(4):
        queue.push("a", i)
    first = queue.pop()
    queue.push_front("a", first)
    assert queue.pop() == 0
    queue.remove("a", lambda item: item == 2)
    assert [queue.pop(), queue.pop()] == [1, 3]
    assert len(queue) == 0
    queue.remove("nobody", lambda item: True)
