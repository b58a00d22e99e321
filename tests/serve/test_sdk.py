"""DeepInfra's own SDK for Node, unmodified but for the address: fetched from npm, so by hand (`-m slow`)."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from application import Serve, clip, demo_config, fake_engine

from serve_app.serving import LocalModel

SCRIPT = """
const { AutomaticSpeechRecognition } = require("deepinfra");
const [url, audio] = process.argv.slice(2);
const model = new AutomaticSpeechRecognition(url, "token", { maxRetries: 0 });
const fields = { task: "transcribe", language: "en", chunk_level: "word", chunk_length_s: 10, temperature: 0.5 };
model.generate({ audio: require("fs").readFileSync(audio), ...fields }).then(a => console.log(JSON.stringify(a)));
"""


@pytest.mark.slow
def test_deepinfras_sdk(serve: Serve, tmp_path: Path) -> None:
    """C100: its strings come in quotes, its numbers as text, its file without a name."""
    npm, node = shutil.which("npm"), shutil.which("node")
    assert npm, "apt-get install npm"
    assert node
    subprocess.run(
        [npm, "install", "--no-fund", "--no-audit", "deepinfra@2.0.2"], cwd=tmp_path, check=True, timeout=240
    )
    (tmp_path / "ask.js").write_text(SCRIPT)
    server = serve(LocalModel("demo", demo_config(engine="fake"), fake_engine()))
    said = subprocess.run(
        [node, "ask.js", f"{server.url}/v1/inference/demo", str(clip("en-five.mp3"))],
        cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    answer = json.loads(said.stdout)
    assert answer["inference_status"]["status"] == "succeeded"
    assert (answer["language"], bool(answer["text"]), bool(answer["words"])) == ("en", True, True)
