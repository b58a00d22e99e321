"""Sixty of the files of `tests/benchmarks/mutated_audio.py`: each a row of a kind that there is, whatever was in it."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path

from tests.benchmarks.mutated_audio import MUTATIONS, run, tried_when_confined

KINDS = {"ok", "truncated", "damaged_audio", "empty_audio", "no_audio_stream", "too_long"}


def test_every_file_is_a_row(tmp_path: Path) -> None:
    outcomes = run(60, tmp_path)
    assert {outcome.result for outcome in outcomes} <= KINDS
    assert Counter(outcome.kind for outcome in outcomes) == {mutation.__name__: 6 for mutation in MUTATIONS}
    assert {o.result for o in outcomes if o.kind == "rename"} == {"ok"}
    assert {o.result for o in outcomes if o.kind == "playlist"} == {"damaged_audio"}


def test_a_trace_tells_what_a_confined_process_tried() -> None:
    lines = """7 openat(AT_FDCWD, "/usr/lib/libav.so", O_RDONLY) = 3
7 prlimit64(0, RLIMIT_NOFILE, {rlim_cur=0, rlim_max=0}, NULL) = 0
8 openat(AT_FDCWD, "/home/a.wav", O_RDONLY) = 3
7 openat(AT_FDCWD, "/etc/passwd", O_RDONLY) = -1 EMFILE (Too many open files)
7 +++ exited with 0 +++
7 socket(AF_INET, SOCK_STREAM, 0) = 3
"""
    tried, n_confined = tried_when_confined(io.StringIO(lines))
    assert (len(tried), n_confined) == (1, 1)
    assert "/etc/passwd" in tried[0]
