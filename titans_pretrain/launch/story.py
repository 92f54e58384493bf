"""The story of a run, from what lies in its folder: its lives, and how each of them ended.

Put together from lives.jsonl (what the ranks noted), restarts.tsv and the marks of its jobs (what
the job script found), and the watchdog's reports. Knows nothing of torch, and writes nothing.
"""

from __future__ import annotations

import calendar
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from titans_pretrain.errors import EXIT_DONE, EXIT_SAVED
from titans_pretrain.launch.slurm import jobs_of
from titans_pretrain.launch.verdict import Restart, read_history
from titans_pretrain.run.files import storage_error
from titans_pretrain.run.folder import RunFolder
from titans_pretrain.run.lives import Facts, read_lives
from titans_pretrain.run.marks import Failure, Marks

LOST = "ended without a word: killed, or its node lost"


@dataclass(frozen=True)
class Life:
    """One start of a run."""

    number: int  # 0: the job's ranks did not come so far as to claim the folder
    job: str = ""  # of Slurm
    queued: int = 0  # how often it had been queued again
    began: float | None = None  # Unix time
    ended: float | None = None  # None: it has not, or it could not say so
    hosts: tuple[str, ...] = ()
    ranks: int = 0
    layout: str = ""
    source: str = ""  # the checkpoint it went on from; "": none, or not known
    first: int | None = None  # the step it went on from
    last: int | None = None  # the last step on record
    reason: str = ""  # of its end; "": it has not ended, or its end is not known yet
    words: str = ""  # what is known of it
    avoided: tuple[str, ...] = ()  # nodes
    code: int | None = None  # exit code, if it left in order
    restarted: bool = False  # the job script has noted that another life follows

    @property
    def name(self) -> str:
        return f"life {self.number}" if self.number else f"job {self.job}, start {self.queued + 1}"

    @property
    def how(self) -> str:
        """How it ended, in a few words."""
        said = ": ".join(filter(None, (self.reason, self.words)))
        avoided = f"; without {', '.join(self.avoided)} from then on" if self.avoided else ""
        return f"{said}{avoided}"


def read_story(run: Path, damaged: Callable[[str], None] | None = None) -> list[Life]:
    """All lives of a run, the first one first. Raises OSError."""
    folder = RunFolder(run)
    restarts = {(r.job, r.life): r for r in _history(run, damaged)}
    facts = read_lives(folder.lives, damaged)
    lives = [
        _life(run, mine, facts[i + 1] if i + 1 < len(facts) else None, restarts)
        for i, mine in enumerate(facts)
    ]
    noted = {(life.job, life.queued) for life in lives}
    begun = begun_at(run)
    for key in sorted((restarts.keys() | begun.keys()) - noted):
        lives += _without_ranks(run, key, begun.get(key), restarts.get(key))
    return sorted(lives, key=lambda life: life.began or life.ended or 0.0)


def begun_at(run: Path) -> dict[tuple[str, int], float]:
    """(job, how often it had been queued again) -> when the job script began (Unix time)."""
    names = ((path, path.name.split(".")) for path in (run / "jobs").glob("begun.*.*"))
    return {(job, int(queued)): path.stat().st_mtime for path, (_, job, queued) in names}


def events_after(run: Path, step: int) -> dict[str, str]:
    """tag -> Markdown: every start of the run that went on from `step` or a later one, how the life
    before it ended, and what the preflight of its nodes found. A run that goes on from `step` so
    tells again what its curves no longer show: each start once. Raises NodeError."""
    starts: list[str] = []
    checks: list[str] = []
    idle: list[Life] = []  # without ranks; the next start with ranks tells of them
    former = None
    try:
        for life in read_story(run):
            idle.append(life)
            if not life.number:
                continue
            for told in idle if (life.first or 0) >= step else ():
                starts.append(_start(told, former))
                checks += _preflight(run, told)
                former = told
            former, idle = life, []
    except OSError as e:
        raise storage_error(e, f"reading the story of {run}") from e
    told_at_once = starts[0] if len(starts) == 1 else "\n".join(f"- {line}" for line in starts)
    texts = {"events/start": told_at_once, "events/preflight": "\n\n".join(checks)}
    return {tag: text for tag, text in texts.items() if text}


def _preflight(run: Path, life: Life) -> Iterator[str]:
    """What the preflight of this life's nodes told, where there was one."""
    path = Marks(run, life.job, life.queued).path("preflight") / "table.txt"
    if life.job and path.exists():
        lines = path.read_text(encoding="utf-8").splitlines()
        yield "\n".join([f"{life.name}:", "", *(f"    {line}" for line in lines)])


def _start(life: Life, former: Life | None) -> str:
    job = f" (job {life.job}, start {life.queued + 1})" if life.job else ""
    where = f" on {', '.join(life.hosts)}" if life.hosts else ""
    begun = f"{life.name} from {f'`{life.source}`' if life.source else 'scratch'}{where}{job}"
    if not life.number:
        begun = f"{life.name}: no rank claimed the run"
    if former is None:
        return f"{begun}."
    at = f" at step {former.last:,}" if former.last is not None else ""
    return f"{begun}. {former.name} ended{at}: {former.how or LOST}"


def _life(
    run: Path, mine: Facts, later: Facts | None, restarts: dict[tuple[str, int], Restart]
) -> Life:
    job, queued = str(mine.get("job", "")), int(mine.get("queued", 0))
    restart = restarts.get((job, queued)) if job else None
    failure = Marks(run, job, queued).failure() if job else None
    ended, last, code = mine.get("ended"), mine.get("step"), mine.get("code")
    if later is not None:
        seen = max(later.get("seen") or 0.0, mine.get("began") or 0.0) or None
        ended, last = ended or seen, last if last is not None else later.get("reached")
    reason, words = _end(restart, failure, code, mine.get("why", ""))
    if not reason:
        until = later.get("began") if later is not None else None
        words = _report(run, mine.get("began", 0.0), until)
        reason = "hang" if words else LOST if later is not None else ""
    return Life(
        number=mine["life"],
        job=job,
        queued=queued,
        began=mine.get("began"),
        ended=ended or (_seconds(restart.time) if restart is not None else None),
        hosts=tuple(mine.get("hosts") or filter(None, [mine.get("host", "")])),
        ranks=mine.get("ranks", 0),
        layout=mine.get("layout", ""),
        source=mine.get("source", ""),
        first=mine.get("from"),
        last=last,
        reason=reason,
        words=words,
        avoided=restart.nodes if restart is not None else (),
        code=code,
        restarted=restart is not None,
    )


def _end(
    restart: Restart | None, failure: Failure | None, code: int | None, why: str
) -> tuple[str, str]:
    """(reason, in words); the job script's reason counts, and the first rank that failed."""
    words = why
    if failure is not None and code not in (EXIT_DONE, EXIT_SAVED):
        words = f"rank {failure.rank} on {failure.host}: {failure.kind}: {failure.what}"
    if restart is not None:
        # Whoever only lost another rank does not know why.
        return restart.reason, "" if words.startswith("LostPeerError") else words
    if code == EXIT_DONE:
        return "done", ""
    if code == EXIT_SAVED:
        return why, ""
    return ("failed", words) if words else ("", "")


def _without_ranks(
    run: Path, key: tuple[str, int], began: float | None, restart: Restart | None
) -> Iterator[Life]:
    """A job's life in which no rank claimed the folder, if anything is known of its end."""
    marks = Marks(run, *key)
    reason, words = _end(restart, marks.failure(), None, " ".join(marks.lines("unfit")))
    if not reason:
        return
    yield Life(
        number=0,
        job=marks.job,
        queued=marks.life,
        began=began,
        ended=_seconds(restart.time) if restart is not None else None,
        reason=reason,
        words=words,
        avoided=restart.nodes if restart is not None else (),
        restarted=restart is not None,
    )


def reports(run: Path, began: float, until: float | None) -> list[Path]:
    """The watchdog's reports of that time, the first one first."""
    found = []
    for path in sorted(run.glob("failure-*-rank-*.txt")):
        stamp = path.name.split("-")[1]
        at = _seconds(stamp, "%Y%m%dT%H%M%SZ")
        if at is not None and int(began) <= at and (until is None or at <= until):
            found.append(path)
    return found


def _report(run: Path, began: float, until: float | None) -> str:
    """Why the watchdog ended a life, if it did."""
    found = reports(run, began, until)
    if not found:
        return ""
    lines = found[0].read_text(encoding="utf-8", errors="replace").splitlines()
    whys = (line.removeprefix("why:").strip() for line in lines if line.startswith("why:"))
    return f"{next(whys, '')} ({found[0].name})"


def _history(run: Path, damaged: Callable[[str], None] | None) -> Sequence[Restart]:
    try:
        return read_history(run, jobs_of(run))
    except ValueError:
        if damaged is not None:
            damaged(str(run / "restarts.tsv"))
        return []


def _seconds(when: str, form: str = "%Y-%m-%dT%H:%M:%SZ") -> float | None:
    """Unix time of a time in UTC, if it is one."""
    try:
        return float(calendar.timegm(time.strptime(when, form)))
    except ValueError:
        return None
