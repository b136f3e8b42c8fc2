"""Every message has an entry in docs/troubleshooting, every pattern there a message; and what counts as a message."""

from __future__ import annotations

from pathlib import Path

import messages
from messages import Line, dead, matches, missing, of_cpp, of_python, of_shell, patterns

PYTHON = """
REMEDY = "set HOME"

def check(count, path, place, old):
    found = f"{path} has {count} rows"
    require(count > 0, f"{found}; expected more")
    if old:
        what = "it is old"
    else:
        what = "it is cut"
    raise DamagedFile(f"{place.name}: {what}, {count:,} bytes; " + REMEDY) from None

def begin(say, warnings, error):
    say(f"warning: no profile: {error}")
    say("the run begins")
    warnings.append(f"{error} is left out")
    raise InputError(str(error))
"""
CPP = """
  if (size < 8) fail(file, "has ", size, " bytes, expected 8 "
                     "for each \\"document\\"");
  throw std::runtime_error("the loader is closed");
"""


def texts(found):
    return [text for _, text in sorted(found)]


def test_every_message_has_an_entry_and_every_pattern_a_message():
    said, listed = messages.messages(), patterns()
    assert len(said) > 700
    assert missing(said, listed) == []
    assert dead(said, listed) == []


def test_what_is_a_message_of_python(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(PYTHON)
    assert texts(of_python(path)) == [
        "… has … rows; expected more",
        "…: it is cut, … bytes; set HOME",
        "…: it is old, … bytes; set HOME",
        "warning: no profile: …",
        "… is left out",
    ]


def test_what_is_a_message_of_other_sources(tmp_path):
    path = tmp_path / "source"
    path.write_text('  echo "error: port $port of ${HOST:-here} is taken" >&2\n: "${RANK:?set RANK}"\necho "step 1"\n')
    assert texts(of_shell(path)) == ["error: port … of … is taken", "set RANK"]
    path.write_text(CPP)
    assert texts(of_cpp(path)) == ['…has … bytes, expected 8 for each "document"…', "the loader is closed…"]


def test_a_message_without_an_entry_and_a_dead_pattern_are_found(tmp_path):
    (tmp_path / "page.md").write_text(
        "## Rows\n\n```text\n… has … rows; expected …\nthe moon is … away\nis …\n```\n\n```bash\nthe run begins\n```\n"
    )
    listed = patterns(tmp_path)
    assert [(Path(line.path).name, line.line) for line in listed] == [("page.md", 4), ("page.md", 5), ("page.md", 6)]
    said = [Line("a.py", 1, "x … has … rows; expected more"), Line("a.py", 2, "the run begins is …")]
    assert missing(said, listed[:2]) == said[1:]
    assert dead(said, listed) == listed[1:]  # one fits no message, one has hardly a letter


def test_a_pattern_has_its_parts_in_order():
    message = Line("a.py", 1, "the step … of … ends; start again")
    assert matches(Line("page.md", 1, "step … ends"), message)
    assert not matches(Line("page.md", 1, "ends … step"), message)
