"""A build is there whole or not at all, however it ends."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from rt.bundle import FORMAT, MANIFEST
from rt.errors import BuildError
from rt.export import staging
from rt.export.staging import staged

# A builder that writes a manifest first, so that half a bundle could be taken for a whole one, and says how far it is.
BUILDER = """
import sys, time
from pathlib import Path
from rt.export import staging

def say(word):
    print(word, flush=True)
    time.sleep(0.05)

class Slow(type(Path())):
    def rename(self, target):
        say("rename")
        super().rename(target)
        say("renamed")
        return target

exchange = staging._exchange

def change(one, other):
    if "--two-steps" in sys.argv:
        return False
    say("exchange")
    exchange(one, other)
    say("exchanged")
    return True

staging._exchange = change
sync = staging._sync
staging._sync = lambda stage: (say("sync"), sync(stage), say("synced"))
staging.Path = Slow
with staging.staged(Slow(sys.argv[1]), force="--force" in sys.argv) as stage:
    (stage / "manifest.json").write_text('{"format": "rt-bundle", "by": "the killed one"}')
    say("half")
    (stage / "engine").write_bytes(b"x" * 100_000)
    say("written")
say("done")
"""
HALF = {"half", "written", "sync", "synced", "rename"}


def write_bundle(stage: Path, by: str) -> None:
    (stage / MANIFEST).write_text(json.dumps({"format": FORMAT, "by": by}))
    (stage / "engine").write_bytes(os.urandom(1000))


def make_bundle(target: Path, by: str, *, force: bool = False) -> None:
    with staged(target, force=force) as stage:
        write_bundle(stage, by)


def by(target: Path) -> str:
    """Who built it; the engine must be there, too."""
    assert {path.name for path in target.iterdir()} == {MANIFEST, "engine"}
    return str(json.loads((target / MANIFEST).read_text())["by"])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def kill_builder_at(word: str, target: Path, number: signal.Signals, *options: str, nth: int = 1) -> int:
    with subprocess.Popen(
        [sys.executable, "-c", BUILDER, target, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as child:
        assert child.stdout
        for line in child.stdout:
            nth -= line.strip() == word
            if nth == 0:
                child.send_signal(number)
                break
        return child.wait()


def test_what_the_block_wrote_is_there_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b" / "bundle"
    with staged(target, force=False) as stage:
        assert stage.parent == target.parent and not target.exists()
        write_bundle(stage, "me")
    assert by(target) == "me"
    assert names(target.parent) == ["bundle"]
    assert target.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, MemoryError])
def test_an_exception_passes_and_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), staged(tmp_path / "bundle", force=False) as stage:
        write_bundle(stage, "me")
        raise error
    assert names(tmp_path) == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_leaves_the_old_bundle_in_place(tmp_path: Path, error: type[BaseException]) -> None:
    make_bundle(tmp_path / "bundle", "old")
    with pytest.raises(error), staged(tmp_path / "bundle", force=True) as stage:
        write_bundle(stage, "new")
        raise error
    assert by(tmp_path / "bundle") == "old" and names(tmp_path) == ["bundle"]


def test_a_full_disk_is_one_line_with_what_is_free(tmp_path: Path) -> None:
    with pytest.raises(BuildError) as error, staged(tmp_path / "bundle", force=False) as stage:
        write_bundle(stage, "me")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    message = str(error.value)
    assert message.startswith(f"{tmp_path / 'bundle'} could not be written: No space left on device (")
    assert "GiB free" in message and "\n" not in message and error.value.exit_code == 1
    assert names(tmp_path) == []


def test_a_disk_that_fails_at_the_swap_leaves_the_old_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(one: Path, other: Path) -> bool:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(other))

    make_bundle(tmp_path / "bundle", "old")
    monkeypatch.setattr(staging, "_exchange", fail)
    with pytest.raises(BuildError, match="Input/output error"):
        make_bundle(tmp_path / "bundle", "new", force=True)
    assert by(tmp_path / "bundle") == "old" and names(tmp_path) == ["bundle"]


def in_two_steps(one: Path, other: Path) -> bool:
    """As on a file system where names cannot change places."""
    return False


def test_a_disk_that_fails_between_the_steps_of_a_swap_gives_the_old_bundle_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "_exchange", in_two_steps)
    target = tmp_path / "bundle"
    make_bundle(target, "old")
    rename = Path.rename

    def fail(self: Path, to: Path) -> Path:
        if to == target and "building" in self.name:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(BuildError, match="Input/output error"):
        make_bundle(target, "new", force=True)
    assert by(target) == "old" and names(tmp_path) == ["bundle"]


def test_an_existing_target_is_refused_before_any_work(tmp_path: Path) -> None:
    make_bundle(tmp_path / "bundle", "old")
    with (
        pytest.raises(BuildError, match=r"bundle exists; choose another -o or replace it with --force$"),
        staged(tmp_path / "bundle", force=False),
    ):
        raise AssertionError("the work has begun")
    assert by(tmp_path / "bundle") == "old" and names(tmp_path) == ["bundle"]


def test_force_replaces_a_bundle_with_everything_in_it(tmp_path: Path) -> None:
    make_bundle(tmp_path / "bundle", "old")
    (tmp_path / "bundle" / "stray").write_text("x")
    make_bundle(tmp_path / "bundle", "new", force=True)
    assert by(tmp_path / "bundle") == "new" and names(tmp_path) == ["bundle"]


def test_force_replaces_a_damaged_bundle_and_fills_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / MANIFEST).write_text(f'{{"format": "{FORMAT}", "sche')
    for name in ("empty", "damaged"):
        make_bundle(tmp_path / name, "new", force=True)
        assert by(tmp_path / name) == "new"


def not_ours(target: Path) -> None:
    target.mkdir()
    (target / "thesis.tex").write_text("years of work")


def web_app(target: Path) -> None:
    target.mkdir()
    (target / MANIFEST).write_text('{"name": "a web page has a manifest.json, too"}')


def file(target: Path) -> None:
    target.write_text("a file")


def link(target: Path) -> None:
    make_bundle(target.with_name("real"), "old")
    target.symlink_to(target.with_name("real"))


def dangling(target: Path) -> None:
    target.symlink_to(target.with_name("nowhere"))


@pytest.mark.parametrize("make", [not_ours, web_app, file, link, dangling])
def test_force_replaces_nothing_but_bundles(tmp_path: Path, make: Callable[[Path], None]) -> None:
    target = tmp_path / "target"
    make(target)
    before = [(path, path.lstat().st_mtime_ns) for path in sorted(tmp_path.rglob("*"))]
    with (
        pytest.raises(BuildError, match="target exists and is not a bundle; --force replaces bundles only"),
        staged(target, force=True),
    ):
        raise AssertionError("the work has begun")
    assert [(path, path.lstat().st_mtime_ns) for path in sorted(tmp_path.rglob("*"))] == before


@pytest.mark.parametrize("where", ["/proc/self/bundle", "{}/file/bundle"])
def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, where: str) -> None:
    (tmp_path / "file").write_text("x")
    target = where.format(tmp_path)
    with (
        pytest.raises(BuildError, match=f"^cannot make {target}: .*; choose another -o$") as error,
        staged(Path(target), force=False),
    ):
        raise AssertionError("the work has begun")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("word", sorted(HALF))
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_build_is_never_a_bundle_and_the_next_one_cleans_up(
    tmp_path: Path, word: str, number: signal.Signals
) -> None:
    target = tmp_path / "bundle"
    assert kill_builder_at(word, target, number) != 0
    assert not target.exists()
    assert len(names(tmp_path)) == (1 if number is signal.SIGKILL else 0)
    make_bundle(target, "the next")
    assert by(target) == "the next" and names(tmp_path) == ["bundle"]


@pytest.mark.parametrize(
    ("word", "left"),
    [("written", "old"), ("exchange", "old"), ("exchanged", "the killed one")],
)
def test_a_killed_exchange_leaves_the_old_or_the_new(tmp_path: Path, word: str, left: str) -> None:
    target = tmp_path / "bundle"
    make_bundle(target, "old")
    assert kill_builder_at(word, target, signal.SIGKILL, "--force") != 0
    assert by(target) == left
    assert len(names(tmp_path)) == 2
    make_bundle(target, "the next", force=True)
    assert by(target) == "the next" and names(tmp_path) == ["bundle"]


@pytest.mark.parametrize(
    ("word", "nth", "left"),
    [
        ("written", 1, "old"),
        ("rename", 1, "old"),
        ("renamed", 1, None),
        ("rename", 2, None),
        ("renamed", 2, "new"),
    ],
)
def test_a_killed_replacement_loses_neither_the_old_nor_the_new(
    tmp_path: Path, word: str, nth: int, left: str | None
) -> None:
    target = tmp_path / "bundle"
    make_bundle(target, "old")
    kill_builder_at(word, target, signal.SIGKILL, "--force", "--two-steps", nth=nth)
    if left is None:
        assert not target.exists(), "killed between the two renames"
        with pytest.raises(ZeroDivisionError), staged(target, force=True):
            assert by(target) == "old", "the next build gives the old bundle back before it begins"
            raise ZeroDivisionError
        assert by(target) == "old"
    else:
        assert by(target) == {"old": "old", "new": "the killed one"}[left]
    make_bundle(target, "the next", force=True)
    assert by(target) == "the next" and names(tmp_path) == ["bundle"]


def test_a_living_build_is_not_cleaned_up_by_another_one(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    with staged(target, force=False) as stage:
        write_bundle(stage, "first")
        with pytest.raises(ZeroDivisionError), staged(target, force=False):
            raise ZeroDivisionError
        assert stage.is_dir()
    assert by(target) == "first" and names(tmp_path) == ["bundle"]


def test_of_two_builds_without_force_the_later_one_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    with pytest.raises(BuildError, match="exists; choose another -o"), staged(target, force=False) as stage:
        write_bundle(stage, "late")
        make_bundle(target, "early")
    assert by(target) == "early" and names(tmp_path) == ["bundle"]


def test_many_builds_at_once_leave_one_whole_bundle(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    errors: list[BaseException] = []

    def work(index: int) -> None:
        try:
            with staged(target, force=True) as stage:
                write_bundle(stage, str(index))
                time.sleep(0.05)
        except BuildError as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert by(target) in map(str, range(8))
    assert errors == [] and names(tmp_path) == ["bundle"]


# Builders that begin together, again and again, and a reader.
CROWD = """
import json, os, sys, time
from pathlib import Path
from rt.errors import BuildError
from rt.export import staging

role, target = sys.argv[1], Path(sys.argv[2])
if role == "two-steps":
    staging._exchange = lambda one, other: False
staging._sync = lambda stage: None
seen = False
print("ready", flush=True)
until = float(input())
while time.time() < until:
    if role == "read":
        manifest = target / "manifest.json"
        assert manifest.exists() or not seen, "gone"
        seen = manifest.exists()
        continue
    time.sleep(-time.time() % 0.02)
    try:
        with staging.staged(target, force=role != "once") as stage:
            (stage / "manifest.json").write_text(json.dumps({"format": "rt-bundle", "by": os.getpid()}))
            (stage / "engine").write_bytes(os.urandom(1000))
    except BuildError as error:
        assert role == "once" and " exists; choose another -o" in str(error), error
"""


@pytest.mark.parametrize("role", ["once", "force", "two-steps"])
def test_builders_that_begin_at_once_leave_one_whole_bundle_and_nothing_else(
    tmp_path: Path, role: str
) -> None:
    target = tmp_path / "bundle"
    roles = [role] * 4 + ["read"] * (role != "two-steps")
    with ExitStack() as ending:
        crowd = [
            ending.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", CROWD, each, target],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
            for each in roles
        ]
        assert [child.stdout and child.stdout.readline() for child in crowd] == ["ready\n"] * len(crowd)
        until = f"{time.time() + 1}\n"
        for child in crowd:
            assert child.stdin
            child.stdin.write(until)
            child.stdin.flush()
        assert [child.communicate()[1] for child in crowd] == [""] * len(crowd)
    assert by(target) in [str(child.pid) for child in crowd]
    assert names(tmp_path) == ["bundle"]


def test_a_folder_that_somebody_else_locks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "_PATIENCE", 0.05)
    with staging._locked(tmp_path), pytest.raises(BuildError, match="is locked by another program"):
        make_bundle(tmp_path / "bundle", "me")


def test_without_locks_bundles_are_built_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(staging.fcntl, "flock", refuse)
    make_bundle(tmp_path / "bundle", "one")
    make_bundle(tmp_path / "bundle", "two", force=True)
    assert by(tmp_path / "bundle") == "two" and names(tmp_path) == ["bundle"]


def test_a_target_whose_manifest_is_no_file_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    os.mkfifo(tmp_path / "bundle" / MANIFEST)
    with pytest.raises(BuildError, match="exists and is not a bundle"):
        make_bundle(tmp_path / "bundle", "me", force=True)


def test_a_sibling_that_only_looks_alike_is_left_alone(tmp_path: Path) -> None:
    for name in (".bundle.building", ".bundle2.building-x", "bundle.building-x"):
        (tmp_path / name).mkdir()
    make_bundle(tmp_path / "bundle", "me")
    assert len(names(tmp_path)) == 4


def test_a_name_with_brackets_is_cleaned_up_like_any_other(tmp_path: Path) -> None:
    target = tmp_path / "bundle[1]"
    kill_builder_at("written", target, signal.SIGKILL)
    make_bundle(target, "the next")
    assert names(tmp_path) == ["bundle[1]"]


def test_the_bundle_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = []
    monkeypatch.setattr(
        staging.os, "fsync", lambda descriptor: order.append(os.readlink(f"/proc/self/fd/{descriptor}"))
    )
    rename = Path.rename
    monkeypatch.setattr(Path, "rename", lambda self, to: (order.append("rename"), rename(self, to))[1])
    make_bundle(tmp_path / "bundle", "me")
    synced = order[: order.index("rename")]
    assert {Path(path).name for path in synced} >= {MANIFEST, "engine"} and len(synced) == 3
    assert order[order.index("rename") + 1 :] == [str(tmp_path)]
