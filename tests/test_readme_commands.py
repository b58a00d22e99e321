"""Every `murmur` command of the README, run in its order, with clips of ours for the reader's files.

Not here: `serve` and its clients (`serve/test_readme_http.py`), `submit` (`test_readme.py`, `test_submit.py`), `demo`
(`test_demo_job.py`).
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import duckdb
import fsspec
import pytest
from commands import murmur

from pipeline import cli
from pipeline.demo import clips_path

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
ELSEWHERE = {"serve", "submit", "demo"}
CLIPS = ("en-one.wav", "de-two.flac")
TEXTS = {"en-one.wav": "The plane to Tokyo leaves at seven o'clock.", "de-two.flac": "Das Flugzeug fliegt."}


def commands() -> list[tuple[str, list[str]]]:
    """(section, words) of each command, without its comment."""
    found = []
    for section in README.split("\n## ")[1:]:
        for block in re.findall(r"```sh\n(.*?)```", section, re.DOTALL):
            lines = (line for line in block.splitlines() if line.startswith("murmur "))
            found += [(section.partition("\n")[0], shlex.split(line, comments=True)[1:]) for line in lines]
    return [(section, words) for section, words in found if words[0] not in ELSEWHERE]


@pytest.fixture
def reader(tmp_path: Path, s3: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A reader's folder and bucket; what stands in the README for what is there."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(clips_path() / "en-five.mp3", "interview.mp3")
    lines, references = [], []
    for i, name in enumerate(CLIPS):
        Path("talks").mkdir(exist_ok=True)
        shutil.copy(clips_path() / name, "talks")
        with fsspec.open(f"{s3}/calls/{name}", "wb") as file:
            file.write((clips_path() / name).read_bytes())
        lines.append({"audio_filepath": f"calls/{name}", "id": f"000{i}", "text": TEXTS[name]})
        references += [
            {"id": f"000{i}", "text": TEXTS[name]},
            {"id": str(tmp_path / "talks" / name), "text": TEXTS[name]},
        ]
    with fsspec.open(f"{s3}/calls.jsonl", "w") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    Path("references.jsonl").write_text("".join(json.dumps(line) + "\n" for line in references))
    Path("settings.yaml").write_text("model: demo\nchunk_level: word\n")  # its own are a cluster's, with GPUs
    return {"openai/whisper-base": "demo", "s3://bucket": s3, "configs/cluster.yaml": "settings.yaml"}


def run(words: list[str]) -> int:
    """Its exit code; in this process, but for what starts Ray."""
    if words[0] == "retry" or "--output" in words:
        return murmur(*words, "--set", "ray.object_store_mb=200").returncode
    with pytest.raises(SystemExit) as end:
        cli.main(words)
    assert isinstance(end.value.code, int)
    return end.value.code


@pytest.mark.ray
def test_every_command(reader: dict[str, str], tmp_path: Path) -> None:
    done = set()
    for section, words in commands():
        here = dict(reader)
        if section == "Is it good enough":  # of a manifest with texts
            here |= {"out": f"{reader['s3://bucket']}/out", "other": f"{reader['s3://bucket']}/out"}
        if "keep.parquet" in words:
            duckdb.sql(next(query for query in re.findall(r"```sql\n(.*?)```", README, re.DOTALL) if "keep" in query))
        told = [here.get(word, word.replace("s3://bucket", reader["s3://bucket"])) for word in words]
        assert run(told) == 0, told
        done.add(words[0])
    assert done >= {"transcribe", "report", "retry", "verify", "clean", "evaluate", "export"}
    assert list((tmp_path / "subtitles").glob("*.srt"))
    assert (tmp_path / "train" / "manifest.jsonl").stat().st_size
