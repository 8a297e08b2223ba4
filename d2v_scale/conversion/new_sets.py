"""A set of shards that is being written: where, by which part of an array of jobs, what was left out, its index."""

import itertools
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from d2v_scale.conversion.converters import NewShard
from d2v_scale.errors import DataError
from d2v_scale.modalities.text.tokenizer import tokenizer_sha256
from d2v_scale.shards.shard_index import SetIndex, ShardEntry, relative_path
from d2v_scale.shards.shard_jobs import AnyJob, Job, Part, earlier, finish, run_all
from d2v_scale.shards.shard_set import INDEX_SUFFIX
from d2v_scale.shards.writing import shard_name

_KEPT = 1000
_NAMED = 20


@dataclass(frozen=True)
class NewSet:
    """Where a set goes, and how it is written."""

    out: Path
    prefix: str = "train"
    per_shard: int = 1000
    processes: int = 1
    max_bad: float = 0.01
    """Share of samples that may be left out."""
    part: tuple[int, int] = (0, 1)
    """Of several programs that write the set together: this one, from 0, and how many there are."""

    @property
    def index_file(self) -> Path:
        """The set's index."""
        return self.out / f"{self.prefix}{INDEX_SUFFIX}"

    def tar(self, number: int) -> Path:
        """A shard of it."""
        return self.out / shard_name(self.prefix, number)

    def known_classes(self) -> list[str]:
        """Of the sets that are in OUT already: a test split has the classes of the training split."""
        indexes = (SetIndex.load(path) for path in sorted(self.out.glob(f"*{INDEX_SUFFIX}")))
        return next((index.classes for index in indexes if index.classes), [])

    def run(self, jobs: Iterable[AnyJob], total: int | None) -> list[Part] | None:
        """Do what of `jobs`, one a shard in their order, is this program's; the parts of all. None: other programs have
        not done theirs yet. `total`: samples of all jobs, for the time that is left."""
        number, count = self.part
        if count == 1:
            return run_all(jobs, self.processes, total=total)
        given = (_Given(job, k % count == number) for k, job in enumerate(jobs))
        parts = run_all(given, self.processes, _finish_own, total=None if total is None else total // count)
        missing = 0
        for k, part in enumerate(parts):
            if part.entry:
                continue
            found = earlier(NewShard(self.tar(k)), part.digest)
            missing += found is None
            parts[k] = found or part
        if not missing:
            return parts
        print(
            f"part {number} of {count}: done. {missing} of {len(parts)} shards are for other parts to write; the last "
            "one writes the index.",
            file=sys.stderr,
        )
        return None

    def save(
        self,
        index: SetIndex,
        parts: list[Part],
        tokenizer: Path | None = None,
        *,
        what: str = "files or documents",
        cure: str = "Remove what is named above, leave it out with --match",
    ) -> int:
        """Put the shards into the index and write it; how much was left out, which is said. Raises DataError where that
        is too much, with the `cure`, and writes nothing."""
        index.shards = [ShardEntry(**part.entry) for part in parts]
        skipped = {name: reason for part in parts for name, reason in part.skipped.items()}
        _judge(index, skipped, self.max_bad, what, cure)
        if tokenizer is not None:
            index.tokenizer, index.tokenizer_sha256 = relative_path(tokenizer, self.out), tokenizer_sha256(tokenizer)
        index.save(self.index_file)
        return len(skipped)


@dataclass
class _Given:
    """A job, and whether it is this program's."""

    job: Job
    mine: bool

    @property
    def record(self) -> Path:
        return self.job.record

    def digest(self) -> str:
        return self.job.digest()

    def is_done(self) -> bool:
        return self.job.is_done()

    def run(self) -> Part:
        return self.job.run()


def _finish_own(given: _Given) -> Part:
    return finish(given) if given.mine else Part(given.digest(), {})


def _judge(index: SetIndex, skipped: dict[str, str], max_bad: float, what: str, cure: str) -> None:
    index.skipped = dict(itertools.islice(skipped.items(), _KEPT))
    for name, reason in itertools.islice(skipped.items(), _NAMED):
        print(f"skipped {name}: {reason}", file=sys.stderr)
    if len(skipped) > _NAMED:
        print(f"skipped {len(skipped) - _NAMED} more", file=sys.stderr)
    total = len(skipped) + index.samples
    could_not = f"{len(skipped)} of {total} {what} could not be read"
    if index.samples == 0:
        raise DataError(f"{could_not}, and nothing is left; no index was written.")
    if len(skipped) > max_bad * total:
        raise DataError(
            f"{could_not}, more than --max_bad {max_bad}; no index was written.",
            f"{cure}, or raise --max_bad.",
        )
