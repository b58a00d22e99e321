"""Which test holds each known fault, of a batch run and over HTTP: numbers and injections as in the project's lists."""

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
    "F43": ("SIGTERM, and a second signal", ("test_submit::test_a_job_is_followed_stopped_and_goes_on",
                                             "test_cli::test_a_signal_ends_the_run_and_it_can_go_on",
                                             "test_cli::test_a_second_signal_ends_the_process_at_once")),
    "F44": ("a long file among short ones", ("test_todo::test_the_longest_first_and_the_unknown_in_their_order",
                                             "test_resume::test_killed_in_the_middle_and_started_again")),
    "F45": ("what a failed row says", ("test_schema::test_public_row_of_a_failed_recording",
                                       "test_schema::test_secrets_of_a_uri_are_not_committed",
                                       "test_seen::test_logs_name_what_failed_and_hold_no_text_and_no_secret")),
    "F47": ("weights cut in half", ("engine/test_checkpoint::test_what_is_wrong_is_refused_by_name",)),
    "F52": ("100 uploads at a byte a second", ("serve/test_limits::test_a_slow_body_is_given_up",)),
    "F53": ("an answer that is never read", ("serve/test_limits::test_an_answer_that_nobody_reads",)),
    "F56": ("a replica killed mid-request", ("serve/test_deployment::test_killed_replica_and_drained_server",
                                             "serve/test_limits::test_an_engine_that_stands_still_is_not_ready")),
    "F58": ("model missing or corrupt at start", ("serve/test_deployment::test_refused_before_anything_is_started",)),
    "F59": ("no room for uploads", ("serve/test_limits::test_a_full_disk",
                                    "serve/test_native_webhook::test_no_room_in_the_spool")),
    "F60": ("1,000 idle connections", ("serve/test_limits::test_a_thousand_idle_connections",)),
    "F62": ("made-up model names and paths", ("serve/test_limits::test_metrics",)),
    "F64": ("contradicting lengths", ("serve/test_limits::test_lengths_that_contradict",)),
    "F66": ("encoded bodies", ("serve/test_limits::test_encoded_bodies",)),
    "F70": ("a transcript that is a script", ("serve/test_limits::test_hostile_text",
                                              "serve/test_page::test_downloads_are_the_files_of_the_package")),
    "F72": ("how tokens are compared", ("serve/test_native::test_every_token_is_compared",)),
    "F79": ("Retry-After of a receiver", ("serve/test_webhook::test_retry_after",)),
    "F81": ("1,000 webhooks to a dead host", ("serve/test_webhook::test_a_thousand_webhooks_to_a_dead_host",)),
    "F82": ("our own route as a webhook", ("serve/test_native_webhook::test_our_own_route_as_the_webhook",)),
    "F84": ("what a delivery carries", ("serve/test_native_webhook::test_queued_and_delivered",)),
    "F85": ("audio from addresses", "addresses are not fetched: test_native::test_data_urls_that_are_none"),
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
    # ---- cases of the HTTP contract
    "C1": ("no token", ("serve/test_native::test_tokens",)),
    "C3": ("another scheme", ("serve/test_native::test_tokens",)),
    "C6": ("two tokens, one dropped", ("serve/test_native::test_tokens",)),
    "C9": ("what needs no token", ("serve/test_native::test_tokens",)),
    "C11": ("the answer's shape", ("serve/test_native::test_shape", "serve/test_native::test_real_speech")),
    "C13": ("words", ("serve/test_native::test_real_speech",)),
    "C14": ("chunk_level left out", ("serve/test_native::test_equal_for_equal_requests",)),
    "C16": ("request ids", ("serve/test_native::test_shape",)),
    "C18": ("temperature 0 in every spelling", ("serve/test_native::test_equal_for_equal_requests",)),
    "C19": ("temperature 1", ("serve/test_native::test_values_in_range",)),
    "C22": ("text without edges", ("serve/test_native::test_shape",)),
    "C23": ("Chinese over JSON", "needs a real checkpoint; bytes of any script pass test_limits::test_hostile_text"),
    "C24": ("wav and mp3", ("serve/test_native::test_every_kind_of_audio",)),
    "C25": ("containers and codecs", ("serve/test_native::test_every_kind_of_audio",)),
    "C28": ("names of files", ("serve/test_native::test_equal_for_equal_requests",)),
    "C32": ("data URLs that are none", ("serve/test_native::test_data_urls_that_are_none",)),
    "C34": ("JSON's numbers as text", ("serve/test_native::test_json_with_a_data_url",)),
    "C35": ("no audio", ("serve/test_native::test_missing_audio",)),
    "C37": ("two files", ("serve/test_native::test_sent_twice",)),
    "C38": ("no bytes, no samples", ("serve/test_native::test_nothing_to_hear",)),
    "C40": ("other content types", ("serve/test_native::test_bodies_that_are_none",)),
    "C41": ("chunked, Expect, HTTP/1.0", ("serve/test_limits::test_ways_to_send_the_same",)),
    "C42": ("translation", ("serve/test_native::test_translate",)),
    "C44": ("tasks that are none", ("serve/test_native::test_values_out_of_range",)),
    "C46": ("a fixed language", ("serve/test_native::test_values_in_range",)),
    "C48": ("every code", ("serve/test_native::test_every_language_of_the_documentation",)),
    "C50": ("codes that are none", ("serve/test_native::test_values_out_of_range",)),
    "C52": ("windows of 1 s and 30 s", ("serve/test_native::test_values_in_range",)),
    "C53": ("lengths out of range", ("serve/test_native::test_values_out_of_range",)),
    "C56": ("temperatures out of range", ("serve/test_native::test_values_out_of_range",)),
    "C57": ("an empty prompt", ("serve/test_native::test_equal_for_equal_requests",)),
    "C61": ("a field twice", ("serve/test_native::test_sent_twice",)),
    "C66": ("one text on every route", ("serve/test_openai::test_json_under_both_prefixes",
                                        "serve/test_openai::test_text")),
    "C70": ("three minutes at 8 kHz", "needs a real checkpoint; de-phone.wav is 8 kHz: test_serving"),
    "C71": ("queued, then delivered", ("serve/test_native_webhook::test_queued_and_delivered",)),
    "C74": ("204, 410", ("serve/test_native_webhook::test_dead_letters_are_visible",)),
    "C76": ("webhooks that are none", ("serve/test_native_webhook::test_addresses_that_are_refused",)),
    "C77": ("an empty webhook, one in quotes", ("serve/test_native_webhook::test_queued_and_delivered",
                                                "serve/test_native::test_equal_for_equal_requests")),
    "C79": ("OpenAI's client", ("serve/test_openai::test_json_under_both_prefixes",)),
    "C80": ("text", ("serve/test_openai::test_text",)),
    "C81": ("srt and vtt", ("serve/test_openai::test_subtitles",)),
    "C85": ("verbose_json", ("serve/test_openai::test_verbose",)),
    "C88": ("usage", ("serve/test_openai::test_seconds_are_rounded_up",)),
    "C93": ("translations", ("serve/test_openai::test_translations",)),
    "C94": ("the list of models", ("serve/test_openai::test_models",)),
    "C95": ("wrong methods and models", ("serve/test_native::test_routing",)),
    "C97": ("metrics", ("serve/test_limits::test_metrics",)),
    "C100": ("DeepInfra's SDK for Node", ("serve/test_sdk::test_deepinfras_sdk",
                                          "serve/test_native::test_without_a_file_name")),
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
        assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}, (
            name
        )
