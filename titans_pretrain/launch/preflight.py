"""A preflight's rank: measures its node, its device and its links before a life begins.

    srun ... python -m titans_pretrain.launch.preflight BOUNDS CONFIG [a.b=c ...]

One task a GPU, as the ranks themselves. Each check runs in a process forked for it and ends, or is
killed, within bounds.seconds, so that a dead device, disk or link costs seconds. Ranks meet at a
store of rank 0; who is not there is not waited for again. What a rank has found is kept on file
after each check, in RUN/jobs/preflight.<job>.<life>/rank-NNNNN.json, and fitness.py judges it:

rank, node, local_rank, device   who; what the config asks for
at, done                         the check that it was in; whether it came to the end
asked                            a request to save came meanwhile
folder, sees, unseen             this folder; whether rank 0's file is in it; whether rank 0 missed
                                 this rank's (one rank of a node: also "run folder", "local disk",
                                 code: see probes.py)
machine, matmul                  see probes.py; {"error"} where it failed
clock                            Unix time at one moment for all
meeting                          why it did not meet the others
network                          [{"what", "nodes", "gb_per_s" or "error"}]: node, pair, all
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from titans_pretrain.errors import EXIT_DONE, ConfigError, TitansError, this_node
from titans_pretrain.launch import probes
from titans_pretrain.launch.fitness import LATE, Bounds
from titans_pretrain.launch.task import place_from_slurm
from titans_pretrain.run import marks
from titans_pretrain.run.files import atomic_write, storage_error

_fork = multiprocessing.get_context("fork")
_LOOK = 0.02  # seconds
_SEEING = 5.0  # seconds in which a network disk shows what another node wrote


class Place(NamedTuple):
    """This rank's."""

    rank: int
    size: int
    local_rank: int
    node: str  # as Slurm calls it
    master: tuple[str, int]


class Note:
    """What this rank has found, kept on file. A disk that refuses is told once, and in the file
    that rank 0 writes in its place."""

    def __init__(self, path: Path, found: dict[str, Any]) -> None:
        self.path, self.found = path, found
        self._told = False

    def add(self, **found: Any) -> None:
        self.found.update(found)
        try:
            atomic_write(self.path, json.dumps(self.found))
        except OSError as e:
            if not self._told:
                print(f"preflight: writing {self.path}: {e}", file=sys.stderr, flush=True)
            self._told = True


def bounded(act: Callable[[], dict[str, Any]], seconds: float) -> dict[str, Any]:
    """What `act` returns in a process forked for it, or {"error": why}."""
    ours, theirs = _fork.Pipe(duplex=False)
    process = _fork.Process(target=_answer, args=(theirs, act, seconds), daemon=True)
    process.start()
    theirs.close()
    try:
        if not ours.poll(seconds):
            return {"error": f"no answer within {seconds:g} s"}
        answer: dict[str, Any] = ours.recv()
        return answer
    except EOFError:
        process.join(1.0)
        return {"error": f"its process ended without an answer (exit code {process.exitcode})"}
    finally:
        process.kill()  # one that waits for a broken device or disk may stay; nobody waits for it
        process.join(1.0)


def _answer(pipe: Any, act: Callable[[], dict[str, Any]], seconds: float) -> None:
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(int(seconds + LATE))  # should its parent be gone
    try:
        answer = act()
    except (RuntimeError, OSError, ValueError, ImportError) as e:
        lines = str(e).strip().splitlines()
        answer = {"error": f"{type(e).__name__}: {lines[0] if lines else 'no word'}"}
    pipe.send(answer)


class Meeting:
    """The ranks that are there, at one point after another. Raises DistError where rank 0 is not
    heard of."""

    def __init__(self, place: Place, bounds: Bounds) -> None:
        import torch.distributed as dist

        self._place, self._bounds = place, bounds
        self.there: dict[int, dict[str, Any]] = {}  # rank -> what it said at the first point
        if place.rank == 0:
            host = _fork.Process(target=_keep_store, args=(place.master, bounds.limit), daemon=True)
            host.start()
        limit = timedelta(seconds=bounds.start_seconds)
        host_name, port = place.master
        self.store = dist.TCPStore(
            host_name, port, is_master=False, wait_for_workers=False, timeout=limit
        )

    def at(self, point: str, said: Any = None) -> dict[int, Any]:
        """Who of those that were at the last point are at this one, and what they say (at the end,
        on rank 0 alone). Rank 0 waits for them; who is not there by then is left out from then."""
        first = not self.there
        expected = range(self._place.size) if first else list(self.there)
        patience = self._bounds.start_seconds if first else self._bounds.seconds + LATE
        self.store.set(f"{point}/{self._place.rank}", json.dumps(said))
        self.store.add(f"{point}/count", 1)
        if self._place.rank == 0:
            end = time.monotonic() + patience
            while self.store.add(f"{point}/count", 0) < len(expected) and time.monotonic() < end:
                time.sleep(_LOOK)
            there = [rank for rank in expected if self.store.check([f"{point}/{rank}"])]
            told = {rank: json.loads(self.store.get(f"{point}/{rank}")) for rank in there}
            # All would be read by all: too much where ranks are many.
            roll = told if point != "end" else dict.fromkeys(told)
            self.store.set(f"{point}/roll", json.dumps(roll))
        self.store.wait([f"{point}/roll"], timedelta(seconds=2 * patience + LATE))
        if self._place.rank != 0:
            roll = json.loads(self.store.get(f"{point}/roll"))
            told = {int(rank): said for rank, said in roll.items()}
        self.there = {rank: self.there.get(rank, said) for rank, said in told.items()}
        return told


def _keep_store(master: tuple[str, int], seconds: float) -> None:
    """A process of its own, so that no thread of the store is there where rank 0 forks."""
    import torch.distributed as dist

    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.alarm(int(seconds))
    host, port = master
    kept = dist.TCPStore(host, port, is_master=True, wait_for_workers=False)
    while kept is not None:
        time.sleep(60.0)


def rounds(nodes: Sequence[str]) -> list[list[tuple[str, str]]]:
    """Neighbours in a ring, each node in one pair at a time: (0,1)(2,3).. then (1,2)..(last,0); of
    an odd number of nodes the last pair has a round of its own."""
    n = len(nodes)
    if n < 3:
        return [[(nodes[0], nodes[1])]] if n == 2 else []
    pair = [(nodes[i], nodes[(i + 1) % n]) for i in range(n)]
    even, odd = pair[0 : n - 1 : 2], pair[1 : n - n % 2 : 2]
    return [even, odd] if n % 2 == 0 else [even, odd, [pair[-1]]]


def check(folder: Path, bounds: Bounds, device: str, place: Place, local_disk: str = "") -> None:
    """All checks of this rank. Collective over all ranks that live.

    Args:
        folder: for findings, in the run folder; device: auto, cpu or cuda, of the config;
        local_disk: a folder on the node's own disk, if there is one.
    """
    note = Note(
        folder / f"rank-{place.rank:05d}.json",
        {"rank": place.rank, "node": place.node, "local_rank": place.local_rank, "device": device}
        | {"folder": str(folder)},
    )
    within = partial(bounded, seconds=bounds.seconds)
    first = place.local_rank == 0  # of its node
    if first:
        note.add(at="the run folder")
        note.add(**{"run folder": within(partial(probes.disk, folder))})
    if first and local_disk:
        note.add(at="the local disk")
        note.add(**{"local disk": within(partial(probes.disk, Path(local_disk)))})
    note.add(at="importing torch")
    import torch  # noqa: F401 - once, for all the processes forked from here

    note.add(at="libraries and GPUs")
    if first:
        note.add(code=within(lambda: {"code": probes.code()}).get("code", "cannot be read"))
    machine = within(partial(probes.machine, device))
    note.add(machine=machine, at="matmul")
    cuda = machine.get("gpus", 0) > place.local_rank
    note.add(matmul=within(partial(probes.matmul, cuda, place.local_rank)), at="meeting the others")
    try:
        meeting = Meeting(place, bounds)
        _with_others(note, meeting, folder, bounds, place, cuda)
    except RuntimeError as e:  # of the store
        said = str(e).strip().splitlines()[0]
        note.add(meeting=f"{':'.join(map(str, place.master))} during {note.found['at']}: {said}")
        note.add(done=True)


def _with_others(
    note: Note, meeting: Meeting, folder: Path, bounds: Bounds, place: Place, cuda: bool
) -> None:
    rank, first = place.rank, place.local_rank == 0
    nonce = f"{os.urandom(8).hex()}\n"
    if rank == 0:
        _write(folder / "nonce", nonce)
    there = meeting.at("begin", {"node": place.node, "cuda": cuda, "nonce": nonce})
    note.add(clock=time.time())
    if rank not in there:
        note.add(meeting=f"came later than start_seconds={bounds.start_seconds:g}", done=True)
        return
    if first:
        note.add(sees=_until(lambda: _read(folder / "nonce") == there[0]["nonce"]))
    nodes = list(dict.fromkeys(said["node"] for said in there.values()))
    cuda = all(said["cuda"] for said in there.values())  # else gloo, which all have
    each: list[tuple[str, list[tuple[str, ...]]]] = [("node", [(node,) for node in nodes])]
    each += [("pair", [*pairs]) for pairs in rounds(nodes)]
    if len(nodes) > 1:
        each.append(("all", [tuple(nodes)]))
    failed: Counter[str] = Counter()  # node -> rounds in which it failed
    for number, (what, groups) in enumerate(each):
        if what == "all" and max(failed.values(), default=0) >= min(2, len(nodes) - 1):
            break  # a node has failed in all of its pairs: all together would fail for its sake
        error = ""
        for group in (group for group in groups if place.node in group):
            note.add(at=f"all-reduce of {what}: {' '.join(group)[:80]}")
            result = _one_all_reduce(meeting, bounds, place, f"{number}/{group[0]}", group, cuda)
            error = result.get("error", "")
            told = {"what": what, "nodes": group, **result}
            note.add(network=[*note.found.get("network", ()), told])
        ended = meeting.at(f"after {number}", bool(error))
        failed.update({there[rank]["node"] for rank, wrong in ended.items() if wrong})
    note.add(at="the end", done=True)
    _end(note, meeting, folder, bounds)


def _one_all_reduce(
    meeting: Meeting,
    bounds: Bounds,
    place: Place,
    name: str,
    group: Sequence[str],
    cuda: bool,
) -> dict[str, Any]:
    ranks = [rank for rank, said in meeting.there.items() if said["node"] in group]
    gone = set(group) - {said["node"] for said in meeting.there.values()}
    if gone:
        return {"error": f"{' '.join(sorted(gone))} no longer answers"}
    act = partial(
        probes.all_reduce,
        place.master,
        name,
        ranks,
        place.rank,
        place.local_rank,
        cuda,
        0.8 * bounds.seconds,  # so that it tells who was missed, rather than be killed
    )
    return bounded(act, bounds.seconds)


def _end(note: Note, meeting: Meeting, folder: Path, bounds: Bounds) -> None:
    """Rank 0 writes the findings that it does not see on the disk, and tells the job script that
    nobody else is to be waited for."""
    if note.found["rank"] != 0:
        with contextlib.suppress(RuntimeError):  # rank 0 may have left: it has heard all
            meeting.at("end", note.found)
        return
    found = meeting.at("end", note.found)
    paths = {rank: folder / f"rank-{rank:05d}.json" for rank in found}
    _until(lambda: all(path.exists() for path in paths.values()))
    for rank, path in paths.items():
        if not path.exists():
            _write(path, json.dumps({**found[rank], "unseen": True}))
    _write(folder / "over", "")


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as e:
        print(f"preflight: writing {path}: {e}", file=sys.stderr, flush=True)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


def _until(act: Callable[[], bool]) -> bool:
    """Whether `act` comes true in a while."""
    end = time.monotonic() + _SEEING
    while not (true := act()) and time.monotonic() < end:
        time.sleep(_LOOK)
    return true


def main(argv: Sequence[str] | None = None) -> int:
    asked = []
    signal.signal(signal.SIGUSR1, lambda *_: asked.append(True))
    bounds_text, config_path, *overrides = sys.argv[1:] if argv is None else argv
    mine = marks.here()
    if mine is None:
        raise ConfigError(
            "TITANS_RUN and TITANS_JOB are not set",
            "the job script starts the preflight",
            "sbatch slurm/pretrain.sbatch, or titans-pretrain submit",
        )
    from titans_pretrain.config import load_config

    bounds = Bounds(**json.loads(bounds_text))
    signal.alarm(int(bounds.limit))  # the last resort: what is on file by then is what was found
    device = load_config(config_path, overrides).train.device
    env = os.environ
    place_from_slurm(env)
    master = (env["MASTER_ADDR"], int(env["MASTER_PORT"]))
    rank, size, local_rank = (int(env[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    place = Place(rank, size, local_rank, this_node(), master)
    folder, local_disk = mine.path("preflight"), env.get("TMPDIR", "")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise storage_error(e, f"beginning in {folder}", starting=True) from e
    check(folder, bounds, device, place, local_disk)
    if asked:
        with contextlib.suppress(OSError):
            path = folder / f"rank-{place.rank:05d}.json"
            atomic_write(path, json.dumps({**json.loads(path.read_text()), "asked": True}))
    return EXIT_DONE


if __name__ == "__main__":
    try:
        sys.exit(main())
    except TitansError as e:
        print(f"titans-pretrain: {e}", file=sys.stderr)
        sys.exit(e.exit_code)
