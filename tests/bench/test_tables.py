"""The figures in the README are those of the records."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from rt.bench.tables import render, update

ROOT = Path(__file__).resolve().parents[2]


def test_the_readme_shows_the_records(tmp_path: Path) -> None:
    copy = tmp_path / "README.md"
    shutil.copyfile(ROOT / "README.md", copy)
    update(copy, ROOT / "bench" / "results")
    assert copy.read_text() == (ROOT / "README.md").read_text(), "run: python -m rt.bench.tables"


def test_a_newer_record_replaces_an_older_one(tmp_path: Path) -> None:
    provenance = {"date": "2020-01-01", "machine": {"processor": "abacus", "cores": 1}}
    record = {"provenance": provenance, "model": "m", "dtype": "fp32", "wall_s": 7.4, "peak_rss_gib": 1.26}
    (tmp_path / "2020-01-01-build.json").write_text(json.dumps(record))
    assert "| `rt build m`, fp32: time, peak memory | 7 s, 1.3 GiB |" in render(tmp_path)
    (tmp_path / "2020-01-02-build.json").write_text(json.dumps(record | {"wall_s": 5.0}))
    assert "7 s" not in render(tmp_path)
    assert "| 5 s, 1.3 GiB |" in render(tmp_path)
