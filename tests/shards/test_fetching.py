"""d2v_scale.shards.fetching and d2v_scale.modalities.text.token_cache"""

import errno
import fcntl
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from d2v_scale.modalities.text.token_cache import CachedTokens, TokenCache
from d2v_scale.shards import fetching
from d2v_scale.shards.fetching import FetchError, ShardCache


def cache(tmp_path: Path, **options: float) -> ShardCache:
    values = {"limit_bytes": 1e9, "timeout_s": 5.0, "retries": 0} | options
    return ShardCache(str(tmp_path / "cache"), **values)  # type: ignore[arg-type]


def test_a_command_is_run_once(tmp_path: Path) -> None:
    url = f"pipe:echo run >> {tmp_path}/runs; echo content"
    for _ in range(2):
        assert Path(cache(tmp_path).fetch(url)).read_text() == "content\n"
    assert (tmp_path / "runs").read_text() == "run\n"


def test_a_url_is_opened_by_fsspec(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"x" * 3_000_000)
    assert Path(cache(tmp_path, timeout_s=60).fetch(f"file://{tmp_path}/a.tar")).stat().st_size == 3_000_000


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("echo no such bucket >&2; exit 3", "status 3: no such bucket"),
        ("echo half; sleep 100", "silent for"),
        ("echo half; exec 1>&- 2>&-; sleep 100", "did not end"),
    ],
)
def test_a_command_that_fails_or_hangs_is_given_up_and_leaves_nothing(
    tmp_path: Path, command: str, reason: str
) -> None:
    started = time.monotonic()
    with pytest.raises(FetchError, match=reason):
        cache(tmp_path, timeout_s=0.5).fetch(f"pipe:{command}")
    assert time.monotonic() - started < 20
    assert sorted(path.suffix for path in (tmp_path / "cache").iterdir()) == [".failed", ".lock"]


def test_a_short_shard_is_not_kept(tmp_path: Path) -> None:
    with pytest.raises(FetchError, match="ended after 4 of 9 bytes"):
        cache(tmp_path).fetch("pipe:printf 1234", size=9)


def test_failures_are_tried_again_and_then_left_alone_for_a_while(tmp_path: Path) -> None:
    once = f"pipe:test -e {tmp_path}/second && echo good || (touch {tmp_path}/second; exit 1)"
    assert Path(cache(tmp_path, retries=1).fetch(once)).read_text() == "good\n"
    ours = cache(tmp_path)
    bad = f"pipe:echo run >> {tmp_path}/runs; exit 1"
    for _ in range(3):
        with pytest.raises(FetchError, match="status 1"):
            ours.fetch(bad)
    assert (tmp_path / "runs").read_text() == "run\n"


def test_processes_that_waited_for_a_hanging_shard_do_not_all_try_it_in_turn(tmp_path: Path) -> None:
    """They took the node's lock one after the other, each with all its attempts: a step never arrived."""
    url = f"pipe:echo run >> {tmp_path}/runs; sleep 100"
    caches = [cache(tmp_path, timeout_s=0.5, retries=1) for _ in range(3)]
    started = time.monotonic()
    with ThreadPoolExecutor(3) as pool:
        failures = [pool.submit(one.fetch, url).exception() for one in caches]
    assert time.monotonic() - started < 5
    assert [str(failure) for failure in failures] == ["was silent for 0 s (tried 2 times)"] * 3
    assert (tmp_path / "runs").read_text() == "run\n" * 2


def test_a_shard_that_trickles_counts_as_hanging_in_the_end(tmp_path: Path) -> None:
    """Every byte began the time-out anew."""
    url = "pipe:while true; do echo x; sleep 0.1; done"
    with pytest.raises(FetchError, match=r"not complete in time \(tried 1 times\)"):
        cache(tmp_path, timeout_s=5, retries=2, total_s=0.5).fetch(url)


def test_a_reader_waits_for_another_process_only_so_long(tmp_path: Path) -> None:
    ours = cache(tmp_path, total_s=0.3)
    (tmp_path / "cache").mkdir()
    with ours.path_of("pipe:echo a").with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(FetchError, match="another process"):
            ours.fetch("pipe:echo a")


def test_a_failure_of_an_earlier_run_is_not_held_against_a_shard(tmp_path: Path) -> None:
    url = f"pipe:test -e {tmp_path}/there && echo good"
    with pytest.raises(FetchError):
        cache(tmp_path).fetch(url)
    (tmp_path / "there").touch()
    assert Path(cache(tmp_path).fetch(url)).read_text() == "good\n"


def test_a_shard_written_anew_at_the_same_url_is_not_served_from_the_old_copy(tmp_path: Path) -> None:
    """Copies went by the URL alone and for ever."""
    shard, ours = tmp_path / "shard", cache(tmp_path)
    url = f"pipe:cat {shard}"
    shard.write_text("old")
    assert Path(ours.fetch(url, 3, "a")).read_text() == "old"
    assert Path(ours.fetch(url, newer_than=time.time() - 60)).read_text() == "old"
    shard.write_text("newer")
    assert Path(ours.fetch(url, 3, "a")).read_text() == "old"
    assert Path(ours.fetch(url, 5, "b")).read_text() == "newer"
    # Without an index only the time can tell.
    assert Path(ours.fetch(url, newer_than=time.time() - 60)).read_text() == "old"
    time.sleep(0.02)
    assert Path(ours.fetch(url, newer_than=time.time() - 0.01)).read_text() == "newer"


def test_the_shards_used_longest_ago_make_room(tmp_path: Path) -> None:
    ours = cache(tmp_path, limit_bytes=2500)
    urls = [f"pipe:head -c 1000 /dev/zero; true {k}" for k in range(3)]
    for k in (0, 1):
        os.utime(ours.fetch(urls[k]), (1000 + k, 1000 + k))
    ours.fetch(urls[0])  # used again, so the other one is the oldest
    ours.fetch(urls[2])
    assert [ours.path_of(url).exists() for url in urls] == [True, False, True]


@pytest.mark.parametrize(
    "address",
    [
        "https://h/a.tar?X-Amz-Date={}&X-Amz-Signature={}",
        "https://h/a.tar?part=1&sig={}",
        "https://bob:{}@h/a.tar",
        "pipe:curl -H 'Authorization: Bearer {}' https://h/a.tar",
    ],
)
def test_a_copy_is_found_whatever_key_its_address_is_signed_with(tmp_path: Path, address: str) -> None:
    first, second = (address.replace("{}", key * 20) for key in ("a", "b"))
    ours = cache(tmp_path)
    assert ours.path_of(first, "sum") == ours.path_of(second, "sum")
    assert ours.path_of(first, "sum") != ours.path_of(first, "another")


def test_what_tells_addresses_apart_is_no_signature(tmp_path: Path) -> None:
    ours = cache(tmp_path)
    assert ours.path_of("https://h/get?id=1", "sum") != ours.path_of("https://h/get?id=2", "sum")


@pytest.fixture
def small_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], str]:
    """The cache lies on a disk of 3000 bytes. Makes URLs of shards of so many bytes that note each download."""
    write = fetching._write

    def nearly_full(out: int, chunk: bytes) -> None:
        used = sum(path.stat().st_size for path in (tmp_path / "cache").iterdir())
        if used + len(chunk) > 3000:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(out, chunk)

    monkeypatch.setattr(fetching, "_write", nearly_full)
    return lambda name, size: f"pipe:echo {name} >> {tmp_path}/runs; head -c {size} /dev/zero"


@pytest.mark.parametrize("size", [2500, None])
def test_a_full_disk_makes_room_of_the_shards_used_longest_ago(
    tmp_path: Path, small_disk: Callable[[str, int], str], size: int | None
) -> None:
    ours = cache(tmp_path)
    urls = [small_disk("a", 1400), small_disk("b", 1400)]
    for k, url in enumerate(urls):
        os.utime(ours.fetch(url), (1000 + k, 1000 + k))
    needed = size or 1500
    assert Path(ours.fetch(small_disk("c", needed), size)).stat().st_size == needed
    assert [ours.path_of(url).exists() for url in urls] == [False, size is None]


def test_a_shard_that_the_disk_has_no_room_for_is_left_alone_for_a_while(
    tmp_path: Path, small_disk: Callable[[str, int], str]
) -> None:
    """No failure was noted, so that every one of its samples fetched the whole shard again."""
    ours = cache(tmp_path)
    for _ in range(3):
        with pytest.raises(FetchError, match="No space left"):
            ours.fetch(small_disk("d", 4000))
    assert (tmp_path / "runs").read_text() == "d\n"
    assert sorted(path.suffix for path in (tmp_path / "cache").iterdir()) == [".failed", ".lock"]


def test_what_a_killed_process_left_of_a_shard_is_removed(tmp_path: Path) -> None:
    """Up to a whole shard stayed beside the cache for ever, and counted towards no limit."""
    ours, url = cache(tmp_path), "pipe:echo a"
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / f".{ours.path_of(url).name}.4000000.tmp").write_bytes(bytes(1000))
    other = tmp_path / "cache" / f".{ours.path_of('pipe:echo b').name}.4000000.tmp"
    other.touch()
    ours.fetch(url)
    assert [path.name for path in (tmp_path / "cache").glob(".*.tmp")] == [other.name]


def test_tokens_are_shared_between_openings(tmp_path: Path) -> None:
    lengths = np.array([3, 0, 2])
    first, second = (TokenCache(str(tmp_path), 1e9, "t").shard("a", lengths) for _ in range(2))
    assert first.unknown(0, 2) == [0, 1, 2]
    first.put(0, np.array([7, 8, 9]))
    first.put(2, np.array([1, 2]))
    assert second.unknown(0, 2) == [1]
    assert second.get(1, 5).tolist() == [8, 9, 1, 2]
    assert TokenCache(str(tmp_path), 1e9, "other").shard("a", lengths).unknown(0, 0) == [0]


def test_a_short_write_on_a_nearly_full_disk_leaves_no_zeros_to_be_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, room = os.pwrite, 5

    def nearly_full(descriptor: int, content: bytes, at: int) -> int:
        nonlocal room
        if room == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = content[:room]
        room -= len(taken)
        return write(descriptor, taken, at)

    cached = CachedTokens(tmp_path / "t", np.array([3, 2]))
    monkeypatch.setattr(os, "pwrite", nearly_full)
    with pytest.raises(OSError, match="No space"):
        cached.put(0, np.array([7, 8, 9]))
    assert cached.unknown(0, 1) == [0, 1]
    room = 1000
    # Whoever writes a document again writes all of it.
    cached.put(0, np.array([7, 8, 9]))
    assert cached.get(0, 3).tolist() == [7, 8, 9]


def test_a_shard_without_documents_has_a_file_too(tmp_path: Path) -> None:
    assert CachedTokens(tmp_path / "t", np.zeros(0, dtype=np.int64)).unknown(0, 0) == []
    assert CachedTokens(tmp_path / "u", np.zeros(2, dtype=np.int64)).get(0, 0).tolist() == []
