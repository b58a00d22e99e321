"""Which test holds each known fault of a batch run: numbers and injections as in the project's list of faults."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent.parent

# number → (what is injected, the tests that hold it); instead of tests a script, or the reason why there is none.
CASES: dict[str, tuple[str, tuple[str, ...] | str]] = {
    "F4": ("a published file cut by 100 bytes", ("test_verify::test_a_truncated_table_file_is_named_with_its_shard",)),
    "F6": ("a stray data file", ("test_ledger::test_only_what_a_ledger_object_names_counts",
                                 "test_verify::test_a_stray_file_among_the_tables_is_named_and_left")),
    "F9": ("a lock of a dead driver elsewhere", (
        "test_lease::test_another_host_is_succeeded_when_its_heart_stands_still",)),
    "F11": ("shuffled manifest", ("test_job::test_shards_parquet_and_a_shuffled_list_that_grew_and_shrank",)),
    "F12": ("rows added and removed", ("test_job::test_shards_parquet_and_a_shuffled_list_that_grew_and_shrank",)),
    "F14": ("input bytes replaced", ("test_changes::test_a_whole_run_over_replaced_files",)),
    "F15": ("no rename, lagging listings", ("faults/test_bad_store::test_no_rename_and_lagging_listings",)),
    "F17": ("clock set back", ("faults/test_zombies::test_nothing_is_decided_by_the_wall_clock",)),
    "F18": ("a finished job again", ("test_resume::test_killed_in_the_middle_and_started_again",
                                     "test_cli::test_a_run_from_begin_to_end")),
    "F22": ("duplicate ids", ("test_manifest::test_an_id_given_twice",
                              "test_job::test_refused_before_anything_is_started")),
    "F23": ("bad line, cut last line", ("test_manifest::test_a_bad_line_is_refused_by_its_number",
                                        "test_manifest::test_a_cut_last_line")),
    "F24": ("BOM, CRLF, 10 MB line, not UTF-8", ("test_manifest::test_bom_crlf_and_blank_lines",
                                                 "test_manifest::test_a_line_of_10_mb",
                                                 "test_manifest::test_a_bad_line_is_refused_by_its_number")),
    "F25": ("empty and missing manifest", ("test_job::test_an_empty_manifest_makes_complete_tables_of_nothing",
                                           "test_job::test_refused_before_anything_is_started")),
    "F27": ("100,000 missing files", "a script with committed results: benchmarks/missing_files.py"),
    "F31": ("a decoder that wants 50 GB", ("test_decoder::test_a_memory_bomb",)),
    "F34": ("an engine process that exits", ("faults/test_processes::test_one_killer_fails_alone",)),
    "F35": ("a row that kills every time", ("faults/test_processes::test_one_killer_fails_alone",)),
    "F36": ("one of two nodes lost", ("faults/test_nodes::test_a_node_is_lost_without_warning",)),
    "F38": ("output not writable", ("test_ledger::test_outputs_that_cannot_be_written",
                                    "test_job::test_refused_before_anything_is_started")),
    "F39": ("404, 403, 503-503-200, reset", ("test_source::test_rows_of_a_source_in_trouble",)),
    "F40": ("a source at 10 kB/s", ("test_source::test_a_source_that_hardly_moves_is_given_up",
                                    "faults/test_sources::test_what_could_not_be_read_is_tried_last_before_it_is_failed")),
    "F43": ("SIGTERM, and a second signal", ("test_cli::test_a_signal_ends_the_run_and_it_can_go_on",)),
    "F44": ("a long file among short ones", ("test_todo::test_the_longest_first_and_the_unknown_in_their_order",
                                             "test_resume::test_killed_in_the_middle_and_started_again")),
    "F45": ("what a failed row says", ("test_schema::test_public_row_of_a_failed_recording",
                                       "test_schema::test_secrets_of_a_uri_are_not_committed",
                                       "test_seen::test_logs_name_what_failed_and_hold_no_text_and_no_secret")),
    "F47": ("weights cut in half", ("engine/test_checkpoint::test_what_is_wrong_is_refused_by_name",)),
    "F90": ("bit-flipped files", ("test_mutated_audio::test_every_file_is_a_row",)),
    "F92": ("VBR mp3, large cover, webm without duration", (
        "test_audio::test_mp3_without_index_and_behind_a_large_picture", "test_audio::test_webm_without_duration")),
    "F93": ("headers only, zip, jpeg, pdf", ("test_audio::test_what_is_no_audio", "test_audio::test_a_header_only")),
    "F95": ("two tracks, 5.1", ("test_audio::test_one_track_of_two_the_same_every_time",
                                "test_audio::test_many_channels_are_averaged")),
    "F98": ("music, laughter", ("engine/test_signals::test_hum_music_and_clicks_give_no_text",)),
    "F101": ("DC, clipping, −60 dBFS, polarity", ("engine/test_signals::test_quiet_speech_is_heard",
                                                       "test_vad::test_speech_is_found_in_bad_audio")),
    "F105": ("one speaker a channel", ("test_channels::test_two_who_speak_are_both_understood",)),
    "F108": ("several languages in one recording",
             "detected once, or with `language: window` for each window; no test until that mode has its hysteresis"),
    "F112": ("24 h", ("test_audio::test_memory_does_not_grow_with_length",
                      "test_units::test_memory_is_that_of_a_unit_however_long_the_stream")),
    "F114": ("a character of several tokens at a seam",
             "a window that ends within a character shows U+FFFD, as the reference's does"),
    "F115": ("half precision", "a script with committed results: benchmarks/half_precision.py"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_each_case_is_held_by_a_test_that_exists(case: str) -> None:
    _, held = CASES[case]
    if isinstance(held, str):
        script = held.partition("results: ")[2]
        assert not script or (TESTS / script).is_file()
        return
    for name in held:
        file, _, test = name.partition("::")
        tree = ast.parse((TESTS / f"{file}.py").read_text())
        assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, name
