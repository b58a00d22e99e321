"""kill -9 again and again over one job: what is lost, and whether the tables are those of a run that nothing disturbed.

    python -m tests.benchmarks.kill_series [--kills 20] [--recordings 200] [--seed 1] [--out FILE]

Demo speech and the demo model in float32, a fifth of the recordings of several Units. First the undisturbed run; then
the same inputs into another output, killed at random moments: the driver, an engine, a decode worker, the decoder
process under it, the raylet, in turn; one in six while it starts, the others after its first commit, or a busy
machine would never come further. Where the run ends by it the same command is started again.

Lost work of a run that was killed: the wall time since its first line ("N to do": loading the model is in it), less
what its committed audio takes at the undisturbed run's rate. Rows are compared one by one; figures (`avg_logprob`
and the like) may differ by 1e-5, since sums depend on what else was in the batch; text, tokens and times may not.
Prints one JSON object on the last line; ends with 1 where a row differs or more than 60 s were lost.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path
from random import Random
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from audio_files import write_wav
from commands import tables
from processes import find, kill, start

from pipeline.demo.train.heldout import make_clip
from pipeline.demo.train.lexicon import LANGUAGES
from pipeline.types import SAMPLE_RATE
from tests.benchmarks.long_talk import talk
from tests.benchmarks.machine import machine

VICTIMS = ("driver", "engine", "driver", "decode worker", "driver", "raylet", "driver", "decoder")
ALLOWED_LOSS_S = 60.0
SAME = 1e-5  # of figures
SETTINGS = ("model=demo", "device=cpu", "dtype=float32", "unit_length_s=30", "chunk_level=word")


@dataclass(frozen=True, slots=True)
class Killed:
    """One kill and what it cost."""

    victim: str
    after_s: float  # since the run's first line
    committed_s: float  # audio that this run had committed by then
    lost_s: float | None  # None: the run went on by itself


class Run:
    """The command as a process, with the moment of its first line."""

    def __init__(self, folder: Path, output: Path) -> None:
        sets = [part for setting in SETTINGS for part in ("--set", setting)]
        self.process = start("transcribe", folder, "--output", output, "--json", *sets)
        self.began: float | None = None
        self.said: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said.append(line)
            if " to do: " in line:
                self.began = time.monotonic()

    def seconds(self) -> float:
        return 0.0 if self.began is None else time.monotonic() - self.began

    def wait(self, output: Path, committed: float | None, more_s: float) -> bool:
        """Wait until it has begun, or (where given) has more than `committed` seconds in the ledger, and `more_s`
        longer; False where it ended before."""
        while self.began is None or (committed is not None and committed_s(output) <= committed):
            if self.process.poll() is not None:
                return False
            time.sleep(0.1)
        time.sleep(more_s)
        return self.process.poll() is None

    def result(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        lines = self.process.stdout.read().splitlines()
        if self.process.wait() != 0:
            raise SystemExit(f"the job ended with {self.process.returncode}:\n{''.join(self.said)}")
        found: dict[str, Any] = json.loads(lines[-1])
        return found


def make_corpus(folder: Path, n: int, random: Random) -> float:
    """`n` WAV files of demo speech, every fifth of two Units; returns their seconds."""
    clips = [make_clip(LANGUAGES[i % 3], 3, seed=7000 + i).pcm for i in range(30)]
    total = 0
    for i in range(n):
        wanted = random.uniform(33, 50) if i % 5 == 0 else random.uniform(3, 7)
        pcm = talk(clips, wanted, random, pause_s=(0.3, 1.0))
        write_wav(folder / f"{i:04}.wav", pcm)
        total += len(pcm)
    return total / SAMPLE_RATE


def committed_s(output: Path) -> float:
    """Audio in the ledger, whatever was committed twice counted twice."""
    total = 0
    for path in (output / "_run" / "ledger").glob("*.json"):
        try:
            total += sum(unit["n_samples"] for unit in json.loads(path.read_text())["units"])
        except ValueError:  # half written when its writer was killed
            continue
    return total / SAMPLE_RATE


def kill_one(run: Run, victim: str, output: Path, before_s: float, rate: float) -> Killed | None:
    """Kill it; None where no such process is there now."""
    targets = [psutil.Process(run.process.pid)] if victim == "driver" else find(run.process.pid, victim)
    if not targets or run.process.poll() is not None:
        return None
    after = run.seconds()
    kill(targets[0])
    done = committed_s(output) - before_s
    ends = victim in ("driver", "raylet")
    return Killed(victim, round(after, 1), round(done, 1), round(max(0.0, after - done / rate), 1) if ends else None)


def series(folder: Path, output: Path, kills: int, rate: float, random: Random) -> tuple[list[Killed], dict[str, Any]]:
    """Kill `kills` times, then let it end."""
    victims = cycle(VICTIMS)
    killed: list[Killed] = []
    run, before_s = Run(folder, output), 0.0
    while len(killed) < kills:
        early = random.random() < 1 / 6
        if not run.wait(output, None if early else before_s, random.uniform(0.0, 6.0)):
            break
        victim = next(victims)
        one = kill_one(run, victim, output, before_s, rate)
        if one is None:
            continue
        killed.append(one)
        print(one, file=sys.stderr)
        if one.lost_s is not None:
            run.process.wait(timeout=120)
            before_s = committed_s(output)
            run = Run(folder, output)
        else:
            time.sleep(random.uniform(1.0, 6.0))
    return killed, run.result()


def compare(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> dict[str, Any]:
    """Rows of two tables: how many are equal to the bit, equal but for figures, and different."""
    exact = close = 0
    different = abs(len(one) - len(other))
    for a, b in zip(one, other, strict=False):
        if a == b:
            exact += 1
        elif all(_same(a[key], b[key]) for key in a):
            close += 1
        else:
            different += 1
    return {"rows": len(one), "equal": exact, "equal_but_for_figures": close, "different": different}


def _same(a: Any, b: Any) -> bool:
    return (
        math.isclose(a, b, rel_tol=0, abs_tol=SAME) if isinstance(a, float) and isinstance(b, float) else bool(a == b)
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--recordings", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    random = Random(arguments.seed)
    with tempfile.TemporaryDirectory() as temporary:
        folder, calm, killed_output = (Path(temporary, name) for name in ("in", "calm", "killed"))
        audio_s = make_corpus(folder, arguments.recordings, random)
        undisturbed = Run(folder, calm).result()
        rate = undisturbed["audio_s"] / undisturbed["this_run"]["wall_s"]
        print(f"{audio_s:.0f} s of audio; undisturbed: RTFx {rate:.1f}", file=sys.stderr)
        killed, last = series(folder, killed_output, arguments.kills, rate, random)
        done, calm_tables = tables(killed_output), tables(calm)
        rows = {name: compare(calm_tables[name], done[name]) for name in calm_tables}
        twice = committed_s(killed_output) - audio_s
    losses = [one.lost_s for one in killed if one.lost_s is not None]
    result = {
        "benchmark": "kill_series",
        "recordings": arguments.recordings,
        "audio_s": round(audio_s),
        "undisturbed_rtfx": round(rate, 1),
        "kills": len(killed),
        "lost_s_most": max(losses, default=None),
        "lost_s_mean": round(sum(losses) / len(losses), 1) if losses else None,
        "committed_twice_s": round(twice, 1),
        "counts": {key: last[key] for key in ("inputs", "ok", "failed", "missing")},
        "tables": rows,
        "each": [asdict(one) for one in killed],
        "machine": machine(),
    }
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    well = not any(row["different"] for row in rows.values()) and max(losses, default=0.0) <= ALLOWED_LOSS_S
    return 0 if well and len(killed) == arguments.kills else 1


if __name__ == "__main__":
    sys.exit(main())
