"""The bulk job on one page: what is checked first, what is still to do, the dataflow, the tables.

    inputs - ledger = todo  →  decode (tasks)  →  engine (actors)  →  sink (data object, then ledger object)  →  tables

What can be refused is refused before any model is loaded: settings, manifest, model, output, lease. What was
committed stays: killed at any moment, the same command again does only what is missing, and a finished run again
starts no Ray. What Ray runs is in `stages.py`, how many of it in `pools.py`, what a commit is in `sink.py`, who died
with what in `census.py`, Ray itself in `cluster.py`.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from pipeline import changes, todo
from pipeline.cluster import Cluster, counting_processes, plain_errors
from pipeline.config import Config, fingerprint_keys
from pipeline.engine import EngineConfig, engine_config
from pipeline.engine.checkpoint import model_fingerprint, read_json, resolve_model, revision_of
from pipeline.engine.fake import Faults
from pipeline.engine.tokens import Tokenizer, check_options
from pipeline.errors import CrashLoopError, OutputError, StoreError
from pipeline.finalize import Success, finalize
from pipeline.journal import Journal
from pipeline.lease import Lease
from pipeline.ledger import Ledger
from pipeline.machine import has_bfloat16
from pipeline.manifest import file_of, filesystem, read_inputs, source_error
from pipeline.output import Output, open_output, read_output, refuse_mismatch, write_inputs
from pipeline.pools import Pools, served_pools, size_pools
from pipeline.progress import Standing, progress
from pipeline.report import Summary, Work, exit_code, number_of

log = logging.getLogger(__name__)

TRIES = 3  # of Ray, at what it has lost
MAX_CALLS = 200  # blocks after which a decode worker is replaced, whatever a codec has leaked by then
RECORDINGS_PER_SHARD = 5_000  # of an hour each: files of some 250 MB, built in one process's memory
MAX_SHARDS = 1_000
PAGE = 4_096  # recordings put off that the driver holds at once


def run(
    inputs: Sequence[str],
    output_uri: str,
    config: Config,
    *,
    retry: bool = False,
    check_inputs: bool = False,
    console: Console | None = None,
) -> Summary:
    """Transcribe what is missing of `inputs` into `output_uri` and bring its tables up to date.

    `retry` redoes the failed Units instead, of `inputs` or (without any) of all failed recordings. `check_inputs` does
    again what was done from other bytes than lie there now (`changes`). Raises the
    `MurmurError` that ends the run; a recording's own failure is a row, and counts in `exit_code`.
    """
    console, began = console or Console(stderr=True), time.monotonic()
    with Cluster(config.ray) as cluster:
        listed = todo.Listing(read_inputs(inputs) if inputs or not retry else ())
        output = begin(output_uri, config, len(listed), cluster)
        command = "retry" if retry else "transcribe"
        with Lease.acquire(output.store) as lease, Journal(output.store, command=command) as journal:
            ledger = Ledger.read(output.store, output.run.n_shards)
            if not retry:
                write_inputs(output.store, listed.recordings())
                changes.settle(listed, ledger, check=check_inputs)
            left = todo.failed(listed if inputs else None, ledger) if retry else todo.missing(listed, ledger)
            round = ledger.next_round() if retry else ledger.round
            journal.note(inputs=len(listed), to_do=len(left))
            work = transcribe(left, round, output, config, cluster, console) if len(left) else None
            done = time.monotonic()
            success = finalize(output, use_ray=cluster.is_connected and output.run.n_shards > 1, lease=lease)
            clock = {
                "start_s": done - began - (work.wall_s if work else 0.0),
                "finalize_s": time.monotonic() - done,
            }
            journal.note(**clock, **(work.to_json() if work else {}))
    return Summary.of(success, work, exit_code(success.counts, config), **clock)


def transcribe(left: todo.Todo, round: int, output: Output, config: Config, cluster: Cluster, console: Console) -> Work:
    """Run what is `left` through the dataflow, showing how far it is."""
    from pipeline.stages import count_ended, count_retries

    pools = _pools(config, cluster)
    console.print(f"{number_of(len(left))} to do: {pools.describe()}, in {output.run.keys['dtype']}")
    if (limit := pools.limit(config.model)) is not None:
        console.print(limit)
    standing = Standing(output, len(left), round)
    began = time.monotonic()
    showing = progress(standing, console, to_do_s=left.estimate.audio_s, tell=count_ended)
    with showing, plain_errors(), counting_processes() as census:
        for one in passes(left, round, output, pools, census):
            if one.why:
                console.print(f"{number_of(len(one.left))} {one.why}")
                count_retries(len(one.left), "engine" if one.alone else "decode")
            run_pass(one, output, config, census)
    wall_s = time.monotonic() - began
    return Work(recordings=len(left), audio_s=standing.look().audio_s, wall_s=wall_s, pools=pools.describe())


@dataclass(frozen=True, slots=True)
class Pass:
    """One time through the dataflow."""

    left: todo.Todo
    round: int
    pools: Pools
    is_final: bool = False  # a source that fails now is a failed row
    alone: bool = False  # Units one at a time
    why: str = ""  # in words, where it is not the first


def passes(left: todo.Todo, round: int, output: Output, pools: Pools, census: Any) -> Iterator[Pass]:
    """All that is `left`; then those whose source failed, once more; last, alone, what was in an engine when it died.

    What is left of a recording, the ledger says. Raises `StoreError` where a store that gave some refuses all now.
    """
    import ray

    yield Pass(left, round, pools)
    if len(listed := _listing(_put_off(census))):
        refuse_if_down(ray.get(census.known_good.remote()))
        ray.get(census.next_pass.remote())
        left = todo.again(listed, _ledger(output), round)
        yield Pass(left, round, pools, is_final=True, why="could not be read, and are tried once more")
    if suspects := ray.get(census.suspects.remote()):
        left = todo.again(_listing(suspects), _ledger(output), round)
        one = dataclasses.replace(pools, engines=1, units_per_call=1, calls_per_engine=1)
        yield Pass(left, round, one, is_final=True, alone=True, why="were in an engine that died, and are run alone")


def run_pass(one: Pass, output: Output, config: Config, census: Any) -> None:
    """The dataflow over one pass, and over what is left of it where Ray itself has lost something that it cannot make
    again (a node with blocks that do not come out the same a second time, say): the ledger knows what was done.

    Raises `CrashLoopError` where nothing more was committed for `TRIES` times.
    """
    from ray.exceptions import RayError

    left, tries, n_units = one.left, 0, len(_ledger(output).winners)
    while len(left):
        try:
            with left.put(output.store, one.pools.decode_tasks) as blocks:
                dataflow(blocks, one, output, config, census)
            return
        except RayError as error:
            ledger = _ledger(output)
            tries = tries + 1 if len(ledger.winners) == n_units else 0
            if not _is_rays_own(error):
                raise
            if tries == TRIES:
                line = str(error).strip().partition("\n")[0]
                raise CrashLoopError(f"Ray fails ({type(error).__name__}: {line}); the same command goes on") from error
            log.warning("Ray lost something (%s), and what is left goes on", type(error).__name__)
            left, n_units = todo.again(left, ledger, one.round), len(ledger.winners)


def _is_rays_own(error: Exception) -> bool:
    """Whether Ray failed, and not what it ran."""
    from ray.exceptions import RayError, RayTaskError

    return isinstance(error.cause, RayError) if isinstance(error, RayTaskError) else True


def dataflow(blocks: todo.Blocks, one: Pass, output: Output, config: Config, census: Any) -> None:
    """Every Unit still to do of the recordings in these blocks, committed one by one as they end."""
    import ray.data
    from ray.data import ActorPoolStrategy, DataContext, TaskPoolStrategy

    from pipeline.sink import LedgerSink
    from pipeline.stages import EngineStage, count_commit, decode, fail_before_commit

    pools = one.pools
    faults = Faults(config.fake.faults, f"{output.store.uri}/_run/faults") if config.engine == "fake" else None
    engine = _engine(config, output, pools, faults)
    DataContext.get_current().target_max_block_size = pools.block_mb << 20
    (
        ray.data.from_arrow(blocks.tables())
        .map_batches(
            decode,
            fn_kwargs={
                "source": blocks.source,
                "config": config,
                "faults": faults,
                "census": census,
                "is_final": one.is_final,
            },
            batch_format="pyarrow",
            batch_size=None,
            compute=TaskPoolStrategy(size=min(pools.decode_tasks, len(blocks))),
            num_cpus=pools.decode_cpus,
            max_calls=MAX_CALLS,  # the engine's actors have none of that, so Ray cannot fuse the two into one process
        )
        .map_batches(
            EngineStage,
            fn_constructor_kwargs={"config": config, "engine": engine, "census": census, "alone": one.alone},
            batch_format="pyarrow",
            batch_size=pools.units_per_call,
            compute=ActorPoolStrategy(size=pools.engines, max_concurrent_calls_per_actor=pools.calls_per_engine),
            num_cpus=pools.engine_cpus,
            num_gpus=pools.engine_gpus,
        )
        .write_datasink(
            LedgerSink(
                output.store,
                output.run.n_shards,
                round=one.round,
                rows_per_write=pools.units_per_call or 1,
                between=partial(fail_before_commit, faults=faults) if faults else None,
                count=count_commit,
            ),
            ray_remote_args={"num_cpus": 0},
            concurrency=min(pools.write_tasks, len(blocks)),
        )
    )


def _pools(config: Config, cluster: Cluster) -> Pools:
    if config.engine != "serve":
        return size_pools(cluster.nodes(), config)
    application = cluster.application(config)
    return served_pools(cluster.free_cpus(), application.replicas, application.is_on_gpu, config)


def _ledger(output: Output) -> Ledger:
    return Ledger.read(output.store, output.run.n_shards)


def _put_off(census: Any) -> Iterator[str]:
    """What a pass has put off because of its source, a page at a time."""
    import ray

    start = 0
    while page := ray.get(census.put_off.remote(start, start + PAGE)):
        yield from page
        start += len(page)


def _listing(recordings: Iterable[str]) -> todo.Listing:
    return todo.Listing(map(todo.from_json, recordings))


def _engine(config: Config, output: Output, pools: Pools, faults: Faults | None) -> EngineConfig | None:
    """The engine as resolved; None: a running application's.

    Ray shows each actor its own GPU as the only one; workers have other current folders.
    """
    if config.engine == "serve":
        return None
    return dataclasses.replace(
        engine_config(config, pools.threads),
        model=str(Path(config.model).resolve()) if Path(config.model).is_dir() else config.model,
        device="cuda" if pools.engine_gpus else "cpu",
        dtype=output.run.keys["dtype"],
        fake_state=faults.state if faults else None,
    )


# ---- what is checked before anything is started


def begin(uri: str, config: Config, n_listed: int, cluster: Cluster) -> Output:
    """The output folder, begun or found to be this run's. Raises `ModelError`, `OutputError`, `OutputMismatchError`."""
    weights, revision = identify(config, cluster)
    return open_output(
        uri,
        settings=config.model_dump(mode="json"),
        keys=_keys(config, resolve_dtype(uri, config, cluster), weights, revision),
        model=config.model,
        model_revision=revision,
        n_shards=config.pool.shards or shards_for(n_listed),
    )


def shards_for(n_listed: int) -> int:
    """Files per table, fixed when an output is begun."""
    return max(1, min(MAX_SHARDS, n_listed // RECORDINGS_PER_SHARD))


def _keys(config: Config, dtype: str, weights: str, revision: str | None) -> dict[str, Any]:
    """What a result depends on, as resolved."""
    return fingerprint_keys(config) | {"dtype": dtype, "weights": weights, "revision": revision}


def identify(config: Config, cluster: Cluster) -> tuple[str, str | None]:
    """(hash of the weights, the model's revision): its files found, fetched if need be, and looked over; or what a
    running application says of its own."""
    if config.engine == "serve":
        served = cluster.application(config).model
        return served.weights, served.revision
    if config.engine == "fake":
        return "fake", config.revision
    folder = resolve_model(config.model, config.revision)
    # What the engine refuses for every recording is refused once, here, without torch.
    check_options(config.decode_options(), Tokenizer.load(folder, read_json(folder, "config.json")["vocab_size"]))
    return model_fingerprint(folder), revision_of(folder, config.revision)


def resolve_dtype(uri: str, config: Config, cluster: Cluster) -> str:
    """The dtype of all engines of this output: one, or equal audio would not give equal text.

    `auto` is what an output was begun with; in a new one it is float16 where engines get GPUs, bfloat16 where all
    nodes' processors are made for it, else float32. Only the cluster can tell. A running application has its own.
    """
    if config.engine == "serve":
        return cluster.application(config).model.info.dtype
    if config.dtype != "auto":
        return config.dtype
    try:
        return str(read_output(uri).run.keys["dtype"])
    except (OutputError, KeyError):
        pass
    if config.engine == "fake":
        return "float32"
    if config.device != "cpu" and size_pools(cluster.nodes(), config).engine_gpus:
        return "float16"
    return "bfloat16" if all(cluster.ask_nodes(has_bfloat16)) else "float32"


def estimate(inputs: Sequence[str], output_uri: str, config: Config, *, check_inputs: bool = False) -> todo.Estimate:
    """What a run would have to do: `--dry-run`. Writes nothing, starts nothing, refuses what the run would refuse."""
    listed = todo.Listing(read_inputs(inputs))
    with Cluster(config.ray) as cluster:
        weights, revision = identify(config, cluster)
        try:
            output = read_output(output_uri)
        except OutputError:  # not begun yet
            return todo.missing(listed, None).estimate
        dtype = resolve_dtype(output_uri, config, cluster)  # of an output: no cluster is asked
    refuse_mismatch(output.store, output.run, _keys(config, dtype, weights, revision))
    ledger = Ledger.read(output.store, output.run.n_shards)
    changes.settle(listed, ledger, check=check_inputs, dry_run=True)
    return todo.missing(listed, ledger).estimate


def finalize_output(output_uri: str, config: Config) -> Success:
    """Bring an output's tables up to what is committed now, also while a run goes on; on Ray if they are many."""
    output = read_output(output_uri)
    with Cluster(config.ray) as cluster:
        use_ray = output.run.n_shards > 1 and bool(cluster.nodes())
        return finalize(output, use_ray=use_ray)


def refuse_if_down(known_good: Mapping[str, str]) -> None:
    """Raise `StoreError` where a store no longer gives a recording (JSON, by store) that it gave before: then what it
    refused is not to be called failed."""
    for store, recording in known_good.items():
        uri = todo.from_json(recording).uri
        try:
            fs, path = filesystem(file_of(uri))
            fs.cat_file(path, start=0, end=1)
        except Exception as error:  # every store's library has exceptions of its own
            reason = source_error(error, uri)
            if reason.store_wide:
                raise StoreError(
                    f"{store} refuses what it gave before ({reason}); nothing is marked as failed"
                ) from None
