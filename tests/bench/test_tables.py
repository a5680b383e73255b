"""The figures in the README are those of the records."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from rt.bench.tables import tables, update

ROOT = Path(__file__).resolve().parents[2]


def test_the_documents_show_the_records(tmp_path: Path) -> None:
    documents = list(tables())
    for document in documents:
        (tmp_path / document).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / document, tmp_path / document)
    update(tmp_path)
    for document in documents:
        assert (tmp_path / document).read_text() == (ROOT / document).read_text(), (
            "run: python -m rt.bench.tables"
        )


def test_every_table_has_its_place() -> None:
    for document, named in tables().items():
        for name, table in named.items():
            assert f"<!-- {name} -->\n{table}\n<!-- /{name} -->" in (ROOT / document).read_text()


def test_a_newer_record_replaces_an_older_one(tmp_path: Path) -> None:
    provenance = {"date": "2020-01-01", "machine": {"processor": "abacus", "cores": 1}}
    record = {"provenance": provenance, "model": "m", "dtype": "fp32", "wall_s": 7.4, "peak_rss_gib": 1.26}

    def render() -> str:
        return tables(tmp_path)[Path("README.md")]["benchmarks"]

    (tmp_path / "2020-01-01-build.json").write_text(json.dumps(record))
    assert "| `rt build m`, fp32: time, peak memory | 7 s, 1.3 GiB |" in render()
    (tmp_path / "2020-01-02-build.json").write_text(json.dumps(record | {"wall_s": 5.0}))
    assert "7 s" not in render()
    assert "| 5 s, 1.3 GiB |" in render()
