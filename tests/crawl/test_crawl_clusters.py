"""The engines of clusters: the ranks of mpirun, and datatrove's executors, which leave what one process leaves."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from toy_stages import LINKS, content, run_toys, toys, write_input

from llm.crawl import chain
from llm.crawl.chain import tasks_of
from llm.crawl.counts import Counts
from llm.crawl.documents import read_documents
from llm.crawl.engines.local import Local
from llm.crawl.settings import CorpusConfig, EngineConfig, InputConfig
from llm.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
TOYS = Path(__file__).with_name("toy_stages.py")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_input(tmp_path / "in")


@pytest.fixture
def alone(source: Path, tmp_path: Path) -> dict[str, str]:
    run_toys(source, tmp_path / "alone", Local(toys, 1))
    return content(tmp_path / "alone")


def mpirun(source: Path, out: Path, schedule: str, ranks: int = 3) -> subprocess.Popen[str]:
    if shutil.which("mpirun") is None:
        pytest.skip("there is no mpirun")
    pytest.importorskip("mpi4py")
    command = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", str(ranks), sys.executable, str(TOYS)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMPI_MCA_rmaps_base_oversubscribe": "1"}
    return subprocess.Popen(
        [*command, str(source), str(out), schedule], env=environment, text=True, stderr=subprocess.PIPE
    )


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["dynamic", "striped"])
@pytest.mark.parametrize("ranks", [1, 3])
def test_ranks_leave_the_same_bytes(
    source: Path, alone: dict[str, str], tmp_path: Path, schedule: str, ranks: int
) -> None:
    process = mpirun(source, tmp_path / "out", schedule, ranks)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert content(tmp_path / "out") == alone


@pytest.mark.slow
@pytest.mark.parametrize(("order", "code"), [("fail", 2), ("defect", 1), ("die", None)])
def test_a_rank_that_fails_ends_all_and_names_its_task(
    source: Path, tmp_path: Path, order: str, code: int | None
) -> None:
    out = tmp_path / "out"
    (source / "3.txt").write_text(f"!{order}\nafter")
    process = mpirun(source, out, "dynamic")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == code if code else process.returncode
    assert "lines task 3 (3.txt)" in errors
    process = mpirun(source, out, "striped")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert not list(out.glob("*/.*"))


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("datatrove", r"engine.kind datatrove needs datatrove; pip install 'ingot\[datatrove\]'"),
        ("ray", "engine.executor ray needs ray; pip install ray"),
    ],
)
def test_a_missing_library_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, missing: str, message: str
) -> None:
    monkeypatch.setattr(chain, "find_spec", lambda name: None if name == missing else name)
    config = CorpusConfig(str(tmp_path), engine=EngineConfig(kind="datatrove", executor="ray"))
    with pytest.raises(InputError, match=message):
        chain.engine_of(config).__enter__()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_datatrove_leaves_the_same_bytes(source: Path, alone: dict[str, str], tmp_path: Path, workers: int) -> None:
    pytest.importorskip("datatrove")
    from llm.crawl.engines.datatrove import Datatrove

    engine, out = Datatrove(toys, EngineConfig(kind="datatrove"), workers, tmp_path / "logs"), tmp_path / "out"
    for _ in range(
        2
    ):  # what is done is known by our reports: the second time datatrove's logs are there, and no output
        run_toys(source, out, engine)
        assert content(out) == alone
        assert sorted((out / "lines/log").read_text().split()) == list("01234")  # each task once
        shutil.rmtree(out)


def test_documents_of_other_readers_get_ids_by_their_place() -> None:
    pytest.importorskip("datatrove")
    from llm.crawl.engines.datatrove import TheirDocument, ours, theirs

    found = list(
        ours([TheirDocument("a", "file/0", metadata={"url": "u", "date": 3}), TheirDocument("b", "file/1")], 3)
    )
    assert [one.id for one in found] == [3 << 32, 3 << 32 | 1]
    assert (found[0].url, found[0].offset, found[0].metadata) == ("u", 0, {"date": "3"})
    assert list(ours(map(theirs, found), 9)) == found


@pytest.mark.slow
def test_options_that_an_executor_does_not_have_are_named(source: Path, tmp_path: Path) -> None:
    pytest.importorskip("datatrove")
    from llm.crawl.engines.datatrove import Datatrove

    engine = Datatrove(toys, EngineConfig(kind="datatrove", options={"partition": "cpu"}), 1, tmp_path / "logs")
    with pytest.raises(InputError, match=r"engine.options do not suit datatrove's executor local: .*partition"):
        run_toys(source, tmp_path / "out", engine)


FAKE_SBATCH = """#!/bin/bash
# Runs the array's tasks one after another in the background, as a job of this number.
script=$(mktemp); cat "${@: -1}" > $script
last=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' $script)
(
  for i in $(seq 0 ${last:-0}); do SLURM_ARRAY_TASK_ID=$i SLURM_NODELIST=here bash $script; done
) > "$0.log" 2>&1 &
echo $! > "$0.pid"
echo "Submitted batch job $!"
"""


@pytest.mark.slow
def test_a_job_of_slurm_is_waited_for(
    source: Path, alone: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("datatrove")
    from llm.crawl.engines import datatrove

    launch = f"import sys; sys.path[:] = {sys.path!r}; import dill; dill.load(open(sys.argv[1], 'rb')).run()"
    programs = {
        "sbatch": FAKE_SBATCH,
        "squeue": '#!/bin/bash\nkill -0 "${@: -1}" 2>/dev/null && echo running\n',
        "scontrol": "#!/bin/bash\necho here\n",
        "srun": '#!/bin/bash\nexec "${@: -2}"\n',
        "launch_pickled_pipeline": f"#!{sys.executable}\n{launch}\n",
        "merge_stats": "#!/bin/bash\n",
    }
    for name, text in programs.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr(datatrove, "POLL", 0.5)
    monkeypatch.setattr(datatrove, "LATE", 3.0)
    settings = EngineConfig(
        kind="datatrove", executor="slurm", options={"time": "1:00", "partition": "cpu", "job_name": "toys"}
    )
    run_toys(source, tmp_path / "out", datatrove.Datatrove(toys, settings, 2, tmp_path / "logs"))
    assert content(tmp_path / "out") == alone
    (source / "9.txt").write_text("!fail")
    with pytest.raises(InputError, match=r"lines task 5 \(9.txt\) did not finish: see .*logs/lines"):
        run_toys(source, tmp_path / "out", datatrove.Datatrove(toys, settings, 2, tmp_path / "logs"))


@pytest.mark.slow
def test_our_stages_stand_among_steps_of_datatrove(source: Path, alone: dict[str, str], tmp_path: Path) -> None:
    pytest.importorskip("datatrove")
    from datatrove.executor import LocalPipelineExecutor  # pyright: ignore[reportMissingImports]
    from datatrove.pipeline.filters import LambdaFilter  # pyright: ignore[reportMissingImports]

    from llm.crawl.engines.datatrove import Sink, Source, Through

    class Short:
        """Ours, of documents as they come."""

        def apply(self, documents, counts: Counts):
            for document in documents:
                if len(document.text) < 8:
                    yield document
                else:
                    counts.remove("long", document)

    tasks = tasks_of(CorpusConfig(str(tmp_path / "out"), InputConfig(str(source))), LINKS[0], LINKS)
    (tmp_path / "out/lines").mkdir(parents=True)
    steps = [Source(toys("lines"), tasks), LambdaFilter(even), Through(Short()), Sink(str(tmp_path / "parts"))]
    stats = LocalPipelineExecutor(steps, tasks=2, workers=1, logging_dir=str(tmp_path / "logs")).run()
    found = [document for path in sorted((tmp_path / "parts").iterdir()) for document in read_documents(path)]
    lines = [document for i in range(5) for document in read_documents(tmp_path / f"alone/lines/{i:05d}.parquet")]
    expected = [document for document in lines if len(document.text) % 2 == 0 and len(document.text) < 8]
    assert sorted(found, key=lambda document: document.id) == expected
    assert '"dropped_long"' in stats.to_json()


def even(document) -> bool:
    return len(document.text) % 2 == 0
