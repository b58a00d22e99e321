"""Settings: where each may come from, which wins, and what is refused with the nearest known key."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config import Config, fingerprint, fingerprint_keys, known_keys, load_config
from pipeline.errors import ConfigError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "c.yaml"
    path.write_text("task: translate\nlanguage: de\nmax_audio_s: 100\npool:\n  engines: 3\nray.num_cpus: 5\n")
    return path


def test_defaults_are_the_contract() -> None:
    config = load_config(env={})
    assert (config.model, config.algorithm, config.chunk_length_s, config.unit_length_s) == (
        "openai/whisper-base", "windows", 30, 300,
    )  # fmt: skip
    assert (config.vad, config.max_failed_fraction, config.max_audio_s) == ("silero", 0, 172_800)


def test_file_then_environment_then_set_then_option(file: Path) -> None:
    env = {"MURMUR_LANGUAGE": "es", "MURMUR_MAX_AUDIO_S": "200", "MURMUR_POOL__ENGINES": "4", "OTHER": "x"}
    config = load_config(file, {"max_audio_s": 400}, ["max_audio_s=300", "pool.decode_tasks=7"], env)
    assert (config.task, config.language, config.max_audio_s) == ("translate", "es", 400)
    assert (config.pool.engines, config.pool.decode_tasks, config.ray.num_cpus) == (4, 7, 5)


def test_an_option_that_was_not_given_overrides_nothing(file: Path) -> None:
    assert load_config(file, {"language": None}, env={}).language == "de"


def test_what_an_output_was_begun_with_lies_below_everything(file: Path) -> None:
    begun = load_config(overrides={"model": "demo", "chunk_length_s": 5, "language": "es"}, env={}).model_dump(
        mode="json"
    )
    config = load_config(file, sets=["pool.shards=2"], env={}, base=begun)
    assert (config.model, config.chunk_length_s, config.language, config.pool.shards) == ("demo", 5, "de", 2)


def test_the_demo_model_brings_defaults_that_a_user_may_override() -> None:
    assert load_config(overrides={"model": "demo"}, env={}).chunk_length_s < 30
    assert load_config(overrides={"model": "demo"}, sets=["chunk_length_s=20"], env={}).chunk_length_s == 20


def test_secrets_of_the_server_are_no_settings() -> None:
    load_config(env={"MURMUR_API_TOKENS": "a", "MURMUR_WEBHOOK_SECRET": "b"})


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["modle=x"], "unknown setting 'modle'; did you mean 'model'?"),
        (["pool.engine=2"], "unknown setting 'pool.engine'; did you mean 'pool.engines'?"),
        (["zzzzqqq=1"], "unknown setting 'zzzzqqq'"),
        (["chunk_length_s=31"], "chunk_length_s: "),
        (["chunk_length_s=0"], "chunk_length_s: "),
        (["temperature=.nan"], "temperature: "),
        (["device"], "expected key=value"),
        (["=1"], "expected key=value"),
        (["language=[unclosed"], "not a YAML value"),
        (["language=german"], "not a code such as 'en'"),
        (["vad=webrtc"], "vad: "),
        (["fake.faults=[{kind: loop, stage: decode}]"], "cannot happen"),
    ],
)
def test_refusals_name_the_key(sets: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(sets=sets, env={})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [("- a\n- b\n", "expected keys"), ("a: [", "is not YAML"), ("\xff", "unknown|expected|YAML")],
)
def test_a_file_that_is_none(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ConfigError, match=message):
        load_config(path, env={})
    with pytest.raises(ConfigError, match="No such file"):
        load_config(tmp_path / "none.yaml", env={})


def test_a_language_in_capitals_is_that_language() -> None:
    assert load_config(sets=["language=DE"], env={}) == load_config(sets=["language=de"], env={})


def test_an_empty_file_sets_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert load_config(tmp_path / "empty.yaml", env={}) == Config()


def test_only_what_changes_a_result_is_in_the_fingerprint() -> None:
    def of(*sets: str) -> str:
        return fingerprint(fingerprint_keys(load_config(sets=sets, env={})))

    same = [
        "pool.engines=9",
        "ray.address=auto",
        "lanes=4",
        "decode_timeout_s=9",
        "max_failed_fraction=1",
        "device=cpu",
    ]
    assert {of(key) for key in same} == {of()}
    different = ["language=de", "chunk_length_s=29", "vad=none", "engine=fake", "algorithm=sequential", "revision=abc"]
    assert len({of(), *map(of, different)}) == 1 + len(different)
    faulty = "fake.faults=[{kind: empty}]"
    assert of(faulty) == of()  # there is no fake engine to have it
    assert of("engine=fake", faulty) != of("engine=fake")


def test_known_keys_are_dotted() -> None:
    assert {"model", "pool.engines", "ray.address", "fake.faults"} <= set(known_keys())
