"""What a folder of features says of itself, in a file of it: of what encoder and shards they are, and what is lacking.

Several processes may write it, one at a time.
"""

import fcntl
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from d2v_scale.errors import DataError
from d2v_scale.files import write_whole

# Who reads a folder of Parquet files as one table passes over names that begin so.
RECORD = "_extract.json"
_EARLIER = "extract.json"
_REMEDY = "Extract into another folder, or remove the files."


class ExtractRecord:
    """The record of a folder, which is there."""

    def __init__(self, out: Path) -> None:
        self._path = out / RECORD
        self._lock = out / f".{RECORD}.lock"
        self._earlier = out / _EARLIER

    def begin(self, making: Mapping[str, Any], sha256_by_target: Mapping[Path, str]) -> None:
        """Note what the files are made of: `making` is of all, the checksums are those of their shards. Those of
        earlier calls stay. Raises DataError where there are features of others, or of unknown ones."""
        with self._locked():
            if self._earlier.is_file() and not self._path.exists():
                self._earlier.replace(self._path)
            before = self._read(making)
            without = before.get("without", {})
            # A shard that could not be extracted may have been restored since.
            known = {name: sha256 for name, sha256 in before.get("shards", {}).items() if name not in without}
            shards = {target.name: sha256 for target, sha256 in sha256_by_target.items()}
            for target in sha256_by_target:
                if known.get(target.name, shards[target.name]) != shards[target.name]:
                    raise DataError(f"{self._path}: {target.name} is of another shard of that name.", _REMEDY)
                if target.name not in known and target.exists():
                    raise DataError(f"{target} is there, and {self._path} does not say what it is of.", _REMEDY)
            if shards.items() - known.items():
                self._write({**before, **making, "shards": known | shards})

    def note(self, what: str, files: list[str], found: Mapping[str, Any]) -> dict[str, Any]:
        """Note under `what` what was `found` of these files, instead of what was noted of them; returns all of it."""
        with self._locked():
            before = json.loads(self._path.read_text())
            noted = {name: value for name, value in before.get(what, {}).items() if name not in files} | dict(found)
            if noted != before.get(what, {}):
                self._write(before | {what: noted})
        return noted

    def _read(self, making: Mapping[str, Any]) -> dict[str, Any]:
        if not self._path.is_file():
            return {}
        try:
            before: dict[str, Any] = json.loads(self._path.read_text())
            before["shards"].items(), before.get("without", {}).items()
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise DataError(f"{self._path} cannot be read: {error!r}.", _REMEDY) from error
        for name, value in making.items():
            if before.get(name) != value:
                raise DataError(
                    f"{self._path}: the features there are of {name} {before.get(name)}, not {value}.", _REMEDY
                )
        return before

    def _write(self, record: Mapping[str, Any]) -> None:
        write_whole(self._path, json.dumps(record, indent=1) + "\n")

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with self._lock.open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
