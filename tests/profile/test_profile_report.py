"""The report says what the records say, is one page without a network, and refuses what is no profile."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from llm.errors import InputError
from llm.profile.compare import compare
from llm.profile.page import render
from llm.profile.record import Memory, Record, Sync
from llm.profile.report import load_profile, summary, write_report
from profile_records import longer, record, waiting

NASTY = '<script>alert("x")</script>&'


def profile(folder: Path, *records: Record) -> Path:
    folder.mkdir(exist_ok=True)
    for each in records:
        each.write(folder / f"rank-{each.rank}.json")
    return folder


class Tags(HTMLParser):
    """The tags and the text of a page; every tag is closed, in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, Any]]] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data + "\n"


def test_the_files_say_what_the_records_say(tmp_path: Path) -> None:
    lines: list[str] = []
    folder = profile(tmp_path / "p", waiting(50.0, record(0)), longer("qkv", 50.0, record(1)))
    content = write_report(folder, lines.append)
    assert json.loads((folder / "report.json").read_text()) == json.loads(json.dumps(content))
    page = Tags((folder / "report.html").read_text())
    assert "slow rank" in page.text and "node1" in page.text
    assert "slow rank" in lines[1] and "rank 1" in lines[1]
    assert content["parts"][1]["slowest_rank"] == 1 and content["parts"][1]["excess_ms"] == 50.0


def test_the_parts_of_a_step_add_up() -> None:
    report = summary([waiting(6.0, record(0)), longer("norm", 6.0, record(1))])
    parts = sum(part["ms"] for part in report["parts"])
    exposed = sum(row["exposed_ms"] for row in report["collectives"])
    assert parts + exposed + report["unattributed_ms"] + report["loader_wait_ms"] <= report["step_ms"] + 1e-9
    assert parts == pytest.approx(report["step_ms"] * sum(part["share"] for part in report["parts"]))
    for row in report["collectives"]:
        assert row["ms"] == pytest.approx(row["exposed_ms"] + row["hidden_ms"])
        assert row["least_exposed_ms"] <= row["exposed_ms"]
    for rank in report["ranks"]:
        assert rank["busy_ms"] + rank["collectives_ms"] + rank["loader_ms"] == pytest.approx(report["step_ms"])


def test_the_roofline_is_the_lower_of_arithmetic_and_bytes() -> None:
    rows = {part["name"]: part for part in summary([record(), record(1)])["parts"]}
    assert rows["qkv"]["of_roofline"] == pytest.approx(0.8)  # 0.8 GFLOP a ms at 1 TFLOP/s
    assert rows["optimizer"]["of_roofline"] == pytest.approx(0.8)  # 8 MB a ms at 10 GB/s, and no arithmetic


def test_names_from_elsewhere_are_text_in_the_page() -> None:
    first = record(0, 1, host=NASTY, device="cpu" + NASTY, syncs=(Sync(NASTY, 1, 40.0),), layout={NASTY: NASTY})
    parts = tuple(replace(part, name=part.name + NASTY) for part in first.parts)
    ops = tuple(replace(op, name=NASTY, part=NASTY) for op in first.ops)
    collectives = tuple(replace(each, name=NASTY) for each in first.collectives)
    owners = tuple(replace(owner, name=NASTY) for owner in first.memory.owners)
    memory = replace(first.memory, owners=owners, categories={NASTY: 9})
    nasty = replace(first, parts=parts, ops=ops, collectives=collectives, memory=memory)
    page = render(summary([nasty]))
    assert "<script" not in page and "alert" in Tags(page).text


def test_the_page_asks_for_nothing_from_elsewhere() -> None:
    page = render(summary([record(), record(1)]))
    assert not {tag for tag, _ in Tags(page).tags} & {"script", "link", "img", "iframe", "object", "image", "use"}
    assert not re.search(r"(?:src|href|url|@import)\b", page)
    assert set(re.findall(r"https?://[^\"]*", page)) <= {"http://www.w3.org/2000/svg"}


@pytest.mark.parametrize("changed", [
    {"step_ms": 0.0, "unprofiled_step_ms": 0.0}, {"parts": (), "collectives": (), "ops": ()},
    {"memory": Memory(0, {}, 0, (), ())}, {"memory": Memory(0, {}, 0, (), ((0.0, 0),))},
    {"syncs": ()}, {"layout": {}}, {"device": "NVIDIA H200"},
])  # fmt: skip
@pytest.mark.parametrize("world", [1, 2])
def test_a_page_is_drawn_of_little(world: int, changed: dict[str, Any]) -> None:
    page = render(summary([record(rank, world, **changed) for rank in range(world)]))
    assert "Memory" in Tags(page).text
    assert not re.search(r"\b(?:nan|inf)\b", page)


def test_a_comparison_says_what_changed(tmp_path: Path) -> None:
    before = profile(tmp_path / "a", record(0), record(1))
    layout = record().layout | {"zero_stage": 2}
    after = profile(tmp_path / "b", *(longer("qkv", 25.0, record(rank, layout=layout)) for rank in range(2)))
    lines: list[str] = []
    compare(before, after, lines.append)
    assert "zero_stage: 1 -> 2" in lines
    rows = {line.rsplit(maxsplit=4)[0].strip(): line.split()[-4:] for line in lines if line.count(".") >= 3}
    assert rows["step"] == ["75.00", "100.00", "+25.00", "+33.3%"]
    assert rows["qkv"] == ["10.00", "35.00", "+25.00", "+250.0%"]
    assert rows["head_loss"][2] == "+0.00"
    assert next(iter(line for line in lines if line.startswith(("head_loss", "norm", "qkv")))).startswith("qkv")
    assert [line for line in lines if "peak" in line]


@pytest.mark.parametrize(("content", "words"), [
    (None, "no rank-"), (b"not json", "not JSON"), (b"[]", "not a JSON object"), (b'{"rank": 0}', "found no"),
])  # fmt: skip
def test_what_is_no_profile_is_refused(tmp_path: Path, content: bytes | None, words: str) -> None:
    good, bad = profile(tmp_path / "good", record(0), record(1)), tmp_path / "bad"
    if content is not None:
        bad.mkdir()
        (bad / "rank-0.json").write_bytes(content)
    for pair in ((good, bad), (bad, good)):
        with pytest.raises(InputError, match=words):
            compare(*pair)


def test_records_of_two_profiles_are_no_profile(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="several profiles"):
        load_profile(profile(tmp_path / "steps", record(0), record(1, steps=(1, 2))))
    with pytest.raises(InputError, match=r"holds ranks \[0, 2\]; expected all 3"):
        load_profile(profile(tmp_path / "gap", record(0, 3), record(2, 3)))
