"""`language: window`: which language each window is in, where what is beside it has its say. Pure.

    phrases    ▆▆▆_ ▆▆▆▆▆_ ▆▆▆_ ▆▆▆▆_ ▆▆▆▆▆▆_ ▆▆▆
    heard: en  .98   .97   .40   .99   .01    .02
           de  .01   .02   .55   .00   .98    .97
    found      en    en    en    en    de     de
    windows    |       a        |  b  |      c       |

A Unit's phrases (what lies between pauses of half a second) are heard each for itself, then joined to windows in one
language. A phrase heard alone may be taken for another language: a name, a cough, two words. So one change of language
costs as much as a phrase that is `CHANGE` times less likely: of all ways to go through a Unit's phrases the likeliest
is taken, which is the product of what was heard and 1 / CHANGE for each change. In other words:

- a phrase for itself, between two of another language, must be heard CHANGE squared (4) times as likely as theirs,
  0.8 against 0.2; a doubtful one keeps its neighbours' language, be they before it or after it;
- where the language changes for good, what was heard on both sides decides where.

Its grain is the Unit: nothing is carried over a Unit's border, for Units are decoded in any order and on any machine.
A further window of the same span (running speech without a pause, a tail that is decoded again, or `sequential`, where
the Unit is one span) knows only what was before it: it changes the language where another is heard more than CHANGE
times as likely. One that is heard without neighbours is what it is heard as. Listening costs an encoder pass a phrase.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

CHANGE = 2.0
_LEAST = 1e-9  # a probability of 0 would forbid for ever what one window did not hear

Heard = NDArray[np.float64]  # [..., languages], probabilities


def settle(heard: Heard) -> list[int]:
    """The language of each phrase, [n, languages] → n indices. Among equally likely ways the one that changes least,
    then the one of the language that comes first."""
    scores = np.log(np.maximum(heard, _LEAST))
    cost = np.log(CHANGE)
    best = scores[0] if len(scores) else np.zeros(0)
    came_from = []
    for row in scores[1:]:
        leader = int(best.argmax())
        changes = best[leader] - cost > best
        came_from.append(np.where(changes, leader, np.arange(len(best))))
        best = np.where(changes, best[leader] - cost, best) + row
    path = [int(best.argmax())] if len(scores) else []
    for origin in reversed(came_from):
        path.append(int(origin[path[-1]]))
    return path[::-1]


def follow(current: int | None, heard: Heard) -> int:
    """The language of a window, [languages], that comes after one in `current`; None: after none."""
    likeliest = int(heard.argmax())
    if current is None or heard[likeliest] > CHANGE * max(float(heard[current]), _LEAST):
        return likeliest
    return current
