"""Published files: named by date, subject and processor; their provenance survives."""

from __future__ import annotations

import json
import subprocess
from dataclasses import asdict
from datetime import date
from pathlib import Path

import pytest

import rt
from rt.bench import record
from rt.bench.record import Provenance, publish


def test_publish_writes_figures_and_provenance(tmp_path: Path) -> None:
    path = publish("Start up of synthetic:sd15", {"import_s": 0.05}, tmp_path / "new")
    body = json.loads(path.read_text())
    provenance = Provenance.from_json(body.pop("provenance"))
    assert body == {"import_s": 0.05}
    assert provenance == Provenance.now()
    kind = provenance.machine.kind
    assert path.name == f"{date.today().isoformat()}-start-up-of-synthetic-sd15-{kind}.json"


def test_versions_name_what_runs() -> None:
    versions = Provenance.now().versions
    assert versions["rt"] == rt.__version__
    assert {"python", "numpy"} < set(versions)
    assert all(versions.values())


def test_provenance_survives_json() -> None:
    now = Provenance.now()
    assert Provenance.from_json(json.loads(json.dumps(asdict(now)))) == now


def test_commit_is_that_of_the_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
        done = subprocess.run(
            ["git", "-C", str(tmp_path), *identity, *arguments], capture_output=True, check=True
        )
        return done.stdout.decode().strip()

    monkeypatch.setattr(rt, "__file__", str(tmp_path / "rt" / "__init__.py"))
    monkeypatch.delenv("RT_COMMIT", raising=False)
    assert record.commit() is None
    monkeypatch.setenv("RT_COMMIT", "0123456789ab")
    assert record.commit() == "0123456789ab"  # where the files came without their history
    git("init")
    assert record.commit() is None
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-m", "first")
    git("tag", "-a", "v9", "-m", "a tag is not a commit")
    head = git("rev-parse", "HEAD")
    assert record.commit() == head[:12]
    (tmp_path / "file").write_text("2")
    assert record.commit() == head[:12] + "-dirty"


def test_records_are_read_in_the_order_in_which_they_were_taken(tmp_path: Path) -> None:
    for name, day, time in (
        ("a", "2026-01-02", "09:00:00"),
        ("b", "2026-01-02", "08:00:00"),
        ("c", "2026-01-01", "23:00:00"),
    ):
        provenance = {"date": day, "time": time}
        (tmp_path / f"{name}.json").write_text(json.dumps({"provenance": provenance, "name": name}))
    (tmp_path / "old.json").write_text(json.dumps({"provenance": {"date": "2026-01-02"}, "name": "old"}))
    assert [each["name"] for each in record.read(tmp_path)] == ["c", "old", "b", "a"]
