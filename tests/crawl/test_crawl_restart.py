"""What is done again after an interruption, and what is refused."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest
from toy_stages import LINKS, Toy, ToySettings, content, run_toys, toys, write_input

from llm.crawl import documents
from llm.crawl.chain import tasks_of
from llm.crawl.engines.local import Local
from llm.crawl.restart import reports_of
from llm.crawl.settings import CorpusConfig, InputConfig
from llm.crawl.tasks import Task, config_of, disk_errors
from llm.errors import InputError

HERE = Local(toys, 1)
OTHER = Local(partial(toys, settings=ToySettings(least=3)), 1)


@pytest.fixture
def done(tmp_path: Path) -> Path:
    run_toys(write_input(tmp_path / "in"), tmp_path / "out", HERE)
    return tmp_path


def starts(out: Path) -> list[int]:
    """The tasks of the first stage that have begun."""
    return [int(line) for line in (out / "lines/log").read_text().split()]


def test_every_document_and_byte_is_counted(done: Path) -> None:
    lines = [line for path in sorted((done / "in").iterdir()) for line in path.read_text().splitlines()]
    even = [line for line in lines if len(line) % 2 == 0]
    reports = reports_of(done / "out/even")
    assert sum(report["documents_in"] for report in reports) == len(lines)
    assert (
        sum(report["documents_out"] for report in reports)
        == len(even)
        == reports_of(done / "out/total")[0]["documents_in"]
    )
    assert sum(report["bytes_out"] for report in reports) == sum(map(len, even))
    assert sum(report["removed"]["odd"] for report in reports) == len(lines) - len(even)
    assert [len(report["samples"]["odd"]) for report in reports] == [3] * 5
    found = [
        document for i in range(5) for document in documents.read_documents(done / f"out/numbered/{i:05d}.parquet")
    ]
    assert [document.text for document in found] == even
    assert {document.metadata["total"] for document in found} == {str(len(even))}
    assert [document.id for document in found] == sorted({document.id for document in found})


def test_a_finished_task_is_not_repeated(done: Path) -> None:
    before = content(done / "out")
    for number in (1, 3):
        (done / f"out/lines/{number:05d}.json").unlink()  # as if it had been killed before its report
    (done / "out/lines/.00001.parquet.1234abcd.tmp").write_bytes(b"half")
    (done / "out/lines/00003.fetched.tmp").mkdir()
    (notes,) = run_toys(done / "in", done / "out", HERE)
    assert ".00001.parquet.1234abcd.tmp" in notes and "00003.fetched.tmp" in notes
    assert sorted(starts(done / "out")) == [0, 1, 1, 2, 3, 3, 4]
    assert content(done / "out") == before


def test_other_settings_are_refused_by_name(done: Path) -> None:
    with pytest.raises(
        InputError, match=r"even was made with other settings \(settings.least: 2 -> 3\); remove .*/even and"
    ):
        run_toys(done / "in", done / "out", OTHER, LINKS[1:2])


def test_another_version_of_a_stage_is_refused(done: Path) -> None:
    with pytest.raises(InputError, match=r"lines was made with other settings \(version: 1 -> 2\)"):
        run_toys(done / "in", done / "out", Local(lambda stage: Toy(stage, version=2), 1))


def test_a_report_of_other_settings_is_refused(done: Path) -> None:
    path = done / "out/even/00002.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"config": config_of(Toy("even", version=9))}))
    with pytest.raises(InputError, match=r"even/00002.json was made with other settings"):
        run_toys(done / "in", done / "out", HERE)


def test_a_changed_input_is_refused(done: Path) -> None:
    path = done / "in/3.txt"
    path.write_text("y" + path.read_text()[1:])  # as long as it was
    with pytest.raises(InputError, match=r"lines/00003.json was made of another input than 3.txt is now; remove"):
        run_toys(done / "in", done / "out", HERE)


def test_a_stage_made_anew_of_the_same_input_serves_the_next(done: Path) -> None:
    before = content(done / "out")
    shutil.rmtree(done / "out/lines")
    run_toys(done / "in", done / "out", HERE)
    assert content(done / "out") == before


def test_a_stage_made_anew_otherwise_does_not_serve_the_next(done: Path) -> None:
    shutil.rmtree(done / "out/even")
    run_toys(done / "in", done / "out", OTHER, LINKS[1:2])
    with pytest.raises(InputError, match=r"total/00000.json was made of another input"):
        run_toys(done / "in", done / "out", HERE, LINKS[2:])


def test_fewer_and_more_files(done: Path) -> None:
    (done / "in/5.txt").write_text("one more")
    run_toys(done / "in", done / "out", HERE, links=LINKS[:1])
    assert sorted(starts(done / "out")) == [0, 1, 2, 3, 4, 5]
    (done / "in/5.txt").unlink()
    with pytest.raises(InputError, match=r"lines/00005\S+ is there, but its input has 5 files now; remove"):
        run_toys(done / "in", done / "out", HERE)


def test_a_stage_waits_for_the_one_before(tmp_path: Path) -> None:
    source, out = write_input(tmp_path / "in"), tmp_path / "out"
    with pytest.raises(InputError, match=r"there is no .*/lines yet; run prepare_data.py lines first, or all"):
        run_toys(source, out, HERE, links=LINKS[1:])
    run_toys(source, out, HERE, links=LINKS[:1])
    (out / "lines/00004.json").unlink()
    with pytest.raises(InputError, match=r"1 of 5 tasks of .*/lines are not done"):
        run_toys(source, out, HERE, links=LINKS[1:])


def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = write_input(tmp_path / "in"), tmp_path / "out"
    (source / "2.txt").write_text("\n".join(f"{i * 7919 % 10_007:x}" * 9 for i in range(9_000)))
    whole = documents.complete_file

    class Full:
        """A file on a disk with room for 50 kB."""

        def __init__(self, file) -> None:
            self._file = file

        def __getattr__(self, name: str):
            return getattr(self._file, name)

        def write(self, content) -> int:
            if self._file.tell() + len(content) > 50_000:
                raise OSError(errno.ENOSPC, "No space left on device")
            return self._file.write(content)

    class Opened:
        def __init__(self, path: Path) -> None:
            self._context = whole(path)

        def __enter__(self):
            return Full(self._context.__enter__())

        def __exit__(self, *error):
            return self._context.__exit__(*error)

    with monkeypatch.context() as patch:
        patch.setattr(documents, "complete_file", Opened)
        with pytest.raises(
            InputError, match=r"lines task 2 \(2.txt\): the disk of .*/lines is full; make room, then run the"
        ):
            run_toys(source, out, HERE)
    assert not [path for path in (out / "lines").iterdir() if path.name.startswith((".", "00002"))]
    run_toys(source, out, HERE)
    assert starts(out).count(2) == 2


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_and_a_full_quota_are_told_alike(tmp_path: Path, number: int) -> None:
    with pytest.raises(InputError, match=r"the disk of .* is full; make room"), disk_errors(tmp_path):
        raise OSError(number, "no room")


def test_another_error_of_a_disk_is_not_taken_for_a_full_one(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="a broken disk"), disk_errors(tmp_path):
        raise OSError(errno.EIO, "a broken disk")


def test_the_largest_tasks_come_first_and_only_those_that_are_left(done: Path) -> None:
    class Noting:
        works, order = staticmethod(toys), list[int]()

        def run(self, stage: str, tasks: Sequence[Task], progress: object) -> None:
            self.order += [task.number for task in tasks]

    for number in (0, 3, 4):  # of files that grow with their number
        (done / f"out/lines/{number:05d}.json").unlink()
    with pytest.raises(InputError, match=r"3 of 5 tasks of .*/lines are not done"):
        run_toys(done / "in", done / "out", Noting(), LINKS[:2])
    assert Noting.order == [4, 3, 0]


def test_tasks_that_read_whole_stages_are_known_by_all_of_them(done: Path) -> None:
    config = CorpusConfig(str(done / "out"), InputConfig(str(done / "in")))
    before = [task.identity for task in tasks_of(config, LINKS[3], LINKS)]
    path = done / "out/total/00000.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"documents_in": 1}))
    after = [task.identity for task in tasks_of(config, LINKS[3], LINKS)]
    assert all(old != new for old, new in zip(before, after, strict=True))
    assert len(set(before)) == 5
