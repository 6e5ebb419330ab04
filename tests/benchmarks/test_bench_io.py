from collections.abc import Iterator
from pathlib import Path

import pytest
from bench_io import Row, format_table, merge_csv, read_csv, versions, write_csv


def test_a_writer_that_dies_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    write_csv(path, [{"a": 1, "b": 2}], ("a", "b"))

    def rows() -> Iterator[Row]:
        yield {"a": 3, "b": 4}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_csv(path, rows(), ("a", "b"))
    assert read_csv(path) == [{"a": "1", "b": "2"}]
    assert list(tmp_path.iterdir()) == [path]


def test_merging_replaces_rows_with_the_same_key_and_keeps_the_others(tmp_path: Path) -> None:
    path = tmp_path / "new" / "table.csv"
    columns = ("name", "seed", "value")
    merge_csv(
        path, [{"name": "x", "seed": 0, "value": 1}, {"name": "x", "seed": 1, "value": 2}], columns, ("name", "seed")
    )
    merge_csv(path, [{"name": "x", "seed": 0, "value": 9}], columns, ("name", "seed"))
    assert [(row["seed"], row["value"]) for row in read_csv(path)] == [("0", "9"), ("1", "2")]


def test_merging_refuses_to_lose_a_column(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    write_csv(path, [{"a": 1, "b": 2}], ("a", "b"))
    with pytest.raises(ValueError, match=r"unknown columns: \['b'\]"):
        merge_csv(path, [{"a": 3}], ("a",), ("a",))
    assert read_csv(path) == [{"a": "1", "b": "2"}]


def test_table_aligns_numbers_right_and_text_left() -> None:
    rows: list[Row] = [{"name": "x", "rate": 5}, {"name": "long", "rate": 12345}, {"name": "none", "rate": ""}]
    assert format_table(rows, ("name", "rate")).splitlines() == ["name   rate", "x         5", "long  12345", "none"]


def test_versions_name_what_is_not_installed() -> None:
    stamp = versions("torch", "no-such-package")
    assert stamp.startswith("python=3.")
    assert " torch=" in stamp
    assert stamp.endswith(" no-such-package=none")
