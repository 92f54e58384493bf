"""The story of a run, top to bottom: prepare, resume, then step after step, save and leave."""

from __future__ import annotations

import contextlib
import logging
import math
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from titans_pretrain.config import DivergenceConfig, RunConfig, dump_config
from titans_pretrain.data.manifest import Manifest
from titans_pretrain.data.sources import validation_sets
from titans_pretrain.data.streaming import Stream
from titans_pretrain.data.validation import validation_batches
from titans_pretrain.describe import describe_run
from titans_pretrain.divergence import Divergence
from titans_pretrain.errors import EXIT_DONE, EXIT_SAVED, DivergedError, TitansError
from titans_pretrain.feed import fetch, open_stream, with_vocabulary
from titans_pretrain.launch import story
from titans_pretrain.measure.failing import Failing
from titans_pretrain.measure.profile import Profile, check_profile
from titans_pretrain.measure.straggler import Stragglers
from titans_pretrain.model.counts import parameter_count
from titans_pretrain.parallel.layout import plan_layout
from titans_pretrain.parallel.rendezvous import told_to_all
from titans_pretrain.parallel.world import World, start_world, world_size
from titans_pretrain.phases import phase
from titans_pretrain.recovery import Recovery, random_state, restore
from titans_pretrain.run import checkpoint, marks
from titans_pretrain.run.console import open_log
from titans_pretrain.run.files import storage_error
from titans_pretrain.run.folder import RunFolder
from titans_pretrain.run.lives import LifeRecord
from titans_pretrain.run.lock import newest_claim
from titans_pretrain.run.saver import Saver
from titans_pretrain.run.signals import stop_request
from titans_pretrain.run.watchdog import Watchdog
from titans_pretrain.step import Progressed, TrainStep
from titans_pretrain.watch import Watch

log = logging.getLogger("titans_pretrain.train")

VERSIONED = ("torch", "deepspeed", "megatron-core", "numpy", "webdataset", "sentencepiece")


def run_training(
    config: RunConfig, *, stop_after: int | None = None, init_from: str | None = None
) -> int:
    """Trains, or continues, the run of `config` on this rank; returns its exit code.

    Args:
        stop_after: save and leave after so many steps of this start, the schedule unchanged.
        init_from: a checkpoint folder whose weights a new run starts from.
    Raises:
        TitansError: the same kind on every rank.
    """
    with told_to_all():
        layout = plan_layout(config, world_size())
    with (
        stop_request() as stop,
        Watchdog(config) as watchdog,
        contextlib.ExitStack() as leaving,
        Failing(config, watchdog.lost) as failing,
    ):
        said = f"{dump_config(config)}--stop-after {stop_after} --init-from {init_from}"
        limits = (watchdog.timeout_s, said, watchdog.everywhere)
        world = failing.joined(start_world(config.train, layout, *limits))
        leaving.callback(world.shut_down)
        watchdog.joined(world, leaving)
        check_profile(config.profile, world.size)
        stream = world.agree(lambda: open_stream(config, world))
        sets = world.agree(lambda: open_validation(config, stream))
        config = failing.config = with_vocabulary(config, stream)
        home = take_folder(config, world, leaving)
        step = failing.step = TrainStep(config, layout, world)
        at, saved = resume(config, home.folder, world, step, stream, init_from)
        world.only_first(lambda: home.folder.write_config(dump_config(config)))
        divergence = Divergence(config.divergence, saved.get("divergence"))
        where = (at.step, at.tokens, stream.progress)
        watch = world.agree(lambda: Watch(config, home.folder, world, leaving, sets, *where))
        announce(config, world, step, stream, at, home, watch, init_from)
        saver = leaving.enter_context(
            Saver(
                home.folder.checkpoints,
                config.checkpoint,
                world,
                still_mine=home.require_mine,
                told=watch.saved,
            )
        )
        recover = Recovery(
            config, home.folder.checkpoints, world, step, stream, divergence, saver.wait
        )

        last = min(config.train.steps, at.step + stop_after if stop_after else math.inf)
        profile = Profile(config, home.folder.path, world, step.stages, at.step + 1, int(last))
        leaving.callback(profile.close)
        stragglers = Stragglers(config.log.straggler, world)
        leaving.callback(stragglers.close)
        saved_time = time.monotonic()
        batches = world.agree(lambda: stream.batches(at.data, at.step + 1))
        leaving.callback(lambda: batches.close())
        stopping = False
        while at.step < last and not stopping:
            profile.reach(at.step + 1)
            stragglers.begin(at.step + 1)
            began = time.perf_counter()
            micro_batches, data = fetch(world, batches, stream, at.data)
            watchdog.fed(micro_batches)
            waited = time.perf_counter() - began
            try:
                with watch.memory(at.step + 1):
                    report = step(micro_batches, at.step + 1, divergence.judge)
            except DivergedError as error:
                at, told = recover(error, at, data)
                world.raise_any(watch.diverged(at, told))
                batches.close()
                batches = world.agree(partial(stream.batches, at.data, at.step + 1))
                continue
            stragglers.end()
            divergence.learnt_from(report.loss)
            took = time.perf_counter() - began
            at = Progressed(at.step + 1, at.tokens + report.tokens, data)
            if due(at.step, config.validation.every, config.train.steps):
                loss, by_set = validate(config, world, step, sets)
                at = replace(at, validation_loss=loss, validation_by_set=by_set)
            minutes = (time.monotonic() - saved_time) / 60
            timed = config.checkpoint.every_minutes and minutes >= config.checkpoint.every_minutes
            with phase("watch"):
                trouble = watch.record(at, report, took, waited, step.whole_model) or saver.poll()
            asked = stop.requested or (world.rank == 0 and home.folder.stop.exists())
            stopping, timed, own = agree_to_go_on(
                world, trouble, asked, bool(timed), stragglers.own(at.step)
            )
            if own:
                watch.slowest, slow = stragglers.judge(own)
                for told in slow:
                    world.raise_any(watch.straggling(at, told))
            leave = stopping or at.step >= last
            if leave or timed or due(at.step, config.checkpoint.every_steps, 0):
                at = replace(at, data=stream.complete(at.data, world.gather_by_data))
                state = state_of(config, home, world, at) | divergence.state()
                watch.stalled += saver.save(state, step.optimizer.fragments(), random_state())
                saved_time = time.monotonic()
        saver.wait()
        if at.step < config.train.steps:
            reason = stop.reason or ("another rank's request" if stopping else "--stop-after")
            reason = str(home.folder.stop) if home.folder.stop.exists() else reason
            log.info("saved at step %d on request (%s); to be continued", at.step, reason)
            world.agree(lambda: watch.stopping(at.step, reason))
            world.agree(lambda: home.left(at.step, EXIT_SAVED, f"saved on request: {reason}"))
            world.only_first(mark_saved)  # all have saved, and none has left
            return EXIT_SAVED
        log.info("done: %d steps, %s tokens", at.step, f"{at.tokens:,}")
        world.agree(lambda: home.left(at.step, EXIT_DONE, "done"))
        return EXIT_DONE


def mark_saved() -> None:
    """Tells the job script, where there is one, that the run is to be continued."""
    try:
        marks.saved()
    except OSError as e:
        raise storage_error(e, "telling the job script of the save") from e


def due(step: int, every: int, last: int) -> bool:
    """Whether something that happens every so many steps, and at `last`, happens at `step`."""
    return every > 0 and (step % every == 0 or step == last)


def open_validation(config: RunConfig, stream: Stream) -> dict[str, Manifest]:
    """The sets to validate on, where the run validates."""
    return validation_sets(config.data, stream.manifests) if config.validation.every else {}


@dataclass(frozen=True)
class Home:
    """The run folder as this life holds it."""

    folder: RunFolder
    life: int
    require_mine: Callable[[], None]  # raises, on rank 0, if a newer life holds the folder
    record: LifeRecord | None  # of rank 0

    def went_on(self, step: int, source: str, hosts: Sequence[str]) -> None:
        """Notes what this life goes on from, and where. Raises NodeError."""
        if self.record is not None:
            self.record.go_on(step, source, hosts)

    def left(self, step: int, code: int, why: str) -> None:
        """Notes how this life ends, in order. Raises NodeError."""
        if self.record is not None:
            self.record.end(step, code, why)


def take_folder(config: RunConfig, world: World, leaving: contextlib.ExitStack) -> Home:
    """Collective. Rank 0 locks the run folder for this life; each rank opens its log."""
    folder = RunFolder(config.folder)
    require_mine: Callable[[], None] = _nothing
    record: LifeRecord | None = None

    def take() -> int:
        nonlocal require_mine, record
        former = newest_claim(folder.path)
        lock = leaving.enter_context(folder.take(patience=marks.patience()))
        require_mine = lock.require_mine
        seen = former.heartbeat if former is not None else None
        record = leaving.enter_context(LifeRecord(folder.lives, folder.metrics, lock.life, seen))
        record.begin(host=world.host, ranks=world.size, layout=world.layout.describe())
        checkpoint.clean(folder.checkpoints)
        if not checkpoint.list_steps(folder.checkpoints):
            folder.write_config(dump_config(config))  # else once the run takes up its checkpoint
        return lock.life

    life = world.only_first(take)
    world.agree(lambda: open_log(folder, world.rank) and None)
    return Home(folder, life, require_mine, record)


def _nothing() -> None:
    return None


@phase("loading")
def resume(
    config: RunConfig,
    folder: RunFolder,
    world: World,
    step: TrainStep,
    stream: Stream,
    init_from: str | None,
) -> tuple[Progressed, dict[str, Any]]:
    """Loads the newest undamaged checkpoint, or the weights of `init_from`, or starts afresh.
    Returns what the checkpoint holds beside tensors, too."""
    found = checkpoint.find_latest(folder.checkpoints, world, log.warning)
    if found is None:
        if init_from is not None:
            source = checkpoint.Found(Path(init_from), checkpoint.verify(Path(init_from), world))
            model, fragments = config.model.model_dump(mode="json"), step.optimizer.fragments()
            world.agree(lambda: checkpoint.load_weights(source, model, fragments))
            step.optimizer.weights_loaded(0)
            log.info("weights of %s (step %d); step 0 of a new run", init_from, source.step)
        return Progressed(0, 0, stream.start()), {}
    if init_from is not None:
        log.info("the run has checkpoints of its own: --init-from %s not used", init_from)
    state = found.state
    data, changes = world.agree(lambda: stream.load_state(state["data"]))
    for change in changes:
        log.warning("data.allow_changed: going on with changed data: %s", change)
    restore(found, config, world, step)
    tell_differences(config, world, state)
    log.info("resumed from %s", found.folder)
    return Progressed(found.step, state["tokens"], data), state


def tell_differences(config: RunConfig, world: World, state: dict[str, Any]) -> None:
    """Warns of what keeps a resumed run from being bitwise the uninterrupted one."""
    now = {
        "ranks": world.size,
        "layout": world.layout.describe(),
        "threads": world.threads,
        "devices": world.device_kind,
        "versions": versions(),
    }
    for key, value in now.items():
        if state.get(key, value) != value:
            log.warning(
                "%s were %s, are %s: the run goes on, but not bitwise", key, state[key], value
            )
    unknown = {"divergence": DivergenceConfig().model_dump(mode="json")}  # once there was none
    before, after = (
        checkpoint.flatten({k: v for k, v in (unknown | tree).items() if k in TRAINING})
        | {"data.validation": tree["data"].get("validation") or {}}
        for tree in (state["config"], config.model_dump(mode="json"))
    )
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) != after.get(key):
            log.warning("%s was %s, is %s", key, before.get(key), after.get(key))


# Sections whose change alters the training that follows. (Other validation sets make validation
# losses, and so the best checkpoint, of another kind.)
TRAINING = ("optim", "train", "divergence")


def versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {name: version(name) for name in VERSIONED}


def agree_to_go_on(
    world: World, trouble: TitansError | None, stop: bool, timed: bool, also: Sequence[float] = ()
) -> tuple[bool, bool, list[float]]:
    """(stop, save, the largest of each of `also`) as all ranks see it; raises on every rank what
    trouble any has met."""
    troubled, stop_any, timed_first, *largest = world.max(
        [float(trouble is not None), float(stop), float(timed and world.rank == 0), *also]
    )
    if troubled:
        world.raise_any(trouble)
    return bool(stop_any), bool(timed_first), largest


@phase("validation")
def validate(
    config: RunConfig, world: World, step: TrainStep, sets: dict[str, Manifest]
) -> tuple[float, dict[str, float]]:
    """Nats a label over all validation sets, each label counted once; and of each set."""
    by_set: dict[str, tuple[float, int]] = {}
    for name, manifest in sets.items():
        batches = validation_batches(
            manifest,
            config.data,
            micro_batch=config.train.micro_batch,
            align=config.model.alignment,
            rows=config.validation.rows,
            dp_rank=world.place.data,
            dp_size=world.layout.data_parallel,
            vocab_size=config.model.vocab_size,
        )
        by_set[name] = step.evaluate(batches)
    losses = {name: loss for name, (loss, _) in by_set.items()}
    if len(losses) == 1:
        return next(iter(losses.values())), losses
    labels = sum(count for _, count in by_set.values())
    return sum(loss * count for loss, count in by_set.values()) / max(1, labels), losses


def state_of(config: RunConfig, home: Home, world: World, at: Progressed) -> dict[str, Any]:
    """What a checkpoint of `at` holds beside tensors."""
    return {
        "step": at.step,
        "tokens": at.tokens,
        "life": home.life,
        "data": at.data,
        "validation_loss": at.validation_loss,
        "config": config.model_dump(mode="json"),
        "versions": versions(),
        "ranks": world.size,
        "layout": world.layout.describe(),
        "threads": world.threads,
        "devices": world.device_kind,
        "time": time.time(),
    }


def announce(
    config: RunConfig,
    world: World,
    step: TrainStep,
    stream: Stream,
    at: Progressed,
    home: Home,
    watch: Watch,
    init_from: str | None,
) -> None:
    """Says in a few lines what is about to run, and in TensorBoard's texts at length."""
    parameters = sum(parameter_count(config.model).values())
    tokens = config.train.global_batch * config.data.sequence_length
    known = sum(m.splits["train"].tokens for m in stream.manifests.values())  # 0: streamed
    log.info(
        "%s, life %d: %s, %s parameters, %d ranks on %s, %d threads each, %s, %s",
        config.folder,
        home.life,
        config.model.variant,
        f"{parameters:,}",
        world.size,
        world.device.type,
        world.threads,
        config.train.precision,
        world.layout.describe(),
    )
    log.info(
        "%s training tokens; steps %d to %d of %s tokens (%d micro-batches on each rank)",
        f"{known:,}" if known else "an unknown number of",
        at.step + 1,
        config.train.steps,
        f"{tokens:,}",
        step.layout.micro_batches,
    )
    source = checkpoint.folder_of(home.folder.checkpoints, at.step) if at.step else init_from
    hosts = world.gather_objects(world.host)
    world.agree(lambda: home.went_on(at.step, str(source or ""), hosts))
    texts = describe_run(config, world, stream.manifests, versions())
    world.agree(lambda: watch.begin(texts, partial(story.events_after, home.folder.path)))
    ramp = config.train.ramp
    if ramp is not None and at.step < ramp.steps:
        log.info("fewer tokens at first: %d rows, growing over %d steps", ramp.start, ramp.steps)
