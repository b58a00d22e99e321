"""Who is suspect after a death, who is put off, and when a run has to stop."""

from __future__ import annotations

from pipeline.census import ALONE, CRASHES, IN_A_ROW, Census, Verdict

A, B, C = ("a", 0), ("b", 0), ("b", 1)
ALL = [(A, "{a}"), (B, "{b}"), (C, "{b}")]


def census(*nodes: str) -> Census:
    return Census(lambda: nodes or ("node",))


def test_what_was_in_an_engine_when_it_died_is_put_off_and_what_had_ended_is_not() -> None:
    it = census()
    assert it.born("engine", "node")
    assert it.take("engine", ALL, alone=False) == [Verdict.RUN] * 3
    it.done("engine", [B])
    assert it.born("engine", "node")
    assert it.take("engine", ALL, alone=False) == [Verdict.DEFER, Verdict.RUN, Verdict.DEFER]
    assert it.suspects() == ["{a}", "{b}"]
    assert it.take("other", ALL[:1], alone=False) == [Verdict.DEFER]  # wherever it is sent


def test_alone_one_that_kills_fails_and_one_that_was_only_there_runs() -> None:
    it = census()
    it.born("engine", "node")
    it.take("engine", ALL, alone=False)
    for _ in range(ALONE):
        it.born("engine", "node")
        assert it.take("engine", ALL[:1], alone=True) == [Verdict.RUN]
    it.born("engine", "node")
    assert it.take("engine", ALL[:1], alone=True) == [Verdict.FAIL]
    for unit in ALL[1:]:
        assert it.take("engine", [unit], alone=True) == [Verdict.RUN]
        it.done("engine", [unit[0]])
    assert not it.suspects()
    assert not it.put_off(0, 9)


def test_a_node_that_was_lost_accuses_nobody() -> None:
    it = census("another")
    it.born("engine", "node")
    it.take("engine", ALL, alone=True)
    it.born("engine", "another")
    assert not it.suspects()
    assert not it.put_off(0, 9)
    assert it.take("engine", ALL, alone=False) == [Verdict.RUN] * 3


def test_engines_that_die_whatever_they_are_given_are_not_started_for_ever() -> None:
    it = census()
    going = [it.born("engine", "node") for _ in range(CRASHES + 2)]
    assert going == [True] * (CRASHES + 1) + [False]
    it.take("engine", ALL, alone=False)
    it.done("engine", [A])
    assert it.born("engine", "node")


def test_a_recording_that_kills_its_decode_process_is_found_in_its_block() -> None:
    it = census()
    assert it.opened("block", "worker-1", "node") == 0
    assert it.opened("block", "worker-2", "node") == 1  # somebody in it
    for worker in ("worker-3", "worker-4"):
        assert not it.is_deadly("block", "fine")
        assert not it.is_deadly("block", "deadly")
        it.opened("block", worker, "node")
    assert not it.is_deadly("block", "fine")
    assert it.is_deadly("block", "deadly")


def test_a_block_that_is_read_again_because_its_node_is_gone_or_its_rows_are_has_killed_nobody() -> None:
    it = census("another")
    it.opened("block", "worker-1", "node")
    assert it.opened("block", "worker-2", "another") == 0
    it.closed("block", [])
    assert it.opened("block", "worker-3", "another") == 0


def test_a_store_that_refuses_too_many_in_a_row_stops_the_run() -> None:
    it = census()
    assert all(it.refused("s3://a", f"{i}", "source") for i in range(IN_A_ROW))
    assert it.refused("s3://b", "elsewhere", "source")
    assert not it.refused("s3://a", "one more", "source")
    assert len(it.put_off(0, 10)) == 10
    assert len(it.put_off(10, 1000)) == IN_A_ROW - 8


def test_an_answer_or_another_error_in_between_begins_the_count_anew() -> None:
    it = census()
    for i in range(4 * IN_A_ROW):
        if i % IN_A_ROW == 0:
            it.answered("s3://a", "good")
        assert it.refused("s3://a", f"{i}", "source")
    it = census()
    assert all(it.refused("s3://a", f"{i}", "source" if i % 2 else "forbidden") for i in range(4 * IN_A_ROW))
    it = census()
    assert all(it.refused("s3://a", f"{i}", "source_timeout") for i in range(4 * IN_A_ROW))  # slow is no refusal


def test_what_a_store_gave_before_is_remembered_for_the_last_pass() -> None:
    it = census()
    it.closed("block", [("s3://a", "good"), ("s3://b", "good too")])
    it.refused("s3://a", "bad", "source")
    it.refused("s3://c", "bad", "source")
    assert it.known_good() == {"s3://a": "good"}
    it.next_pass()
    assert not it.suspects()
    assert not it.put_off(0, 9)
    assert it.known_good() == {}
