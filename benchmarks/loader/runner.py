"""Runs the cases: loaders take turns, each in its own process, and every result is a line of JSON."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from benchmarks.clock import rotated
from benchmarks.loader.cases import FULL, QUICK, Case, Scale, parts
from benchmarks.loader.systems import QUICK as QUICK_SYSTEMS
from benchmarks.loader.systems import SYSTEMS, runs
from benchmarks.report import Record, append, begin, read
from llm.errors import InputError, require

ROOT = Path(__file__).parents[2]  # of the checkout, from where `llm` is imported
PREPARING_SECONDS = 900.0  # after which the conversion of a corpus is ended
MEASURING_SECONDS = 60.0  # and a measurement
FAILURES = {"wrong", "error", "absent"}  # keys of a record without figures


@dataclass
class Runner:
    """out: the folder of results.jsonl, continued where it ends, and of the corpora."""

    out: Path
    quick: bool
    only: str = ""
    rounds: int | None = None
    """Of every part that has several; None: as the scale says."""
    head: Record = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)
    _servers: dict[str, subprocess.Popen] = field(default_factory=dict)
    _prepared: set[tuple] = field(default_factory=set)

    @property
    def scale(self) -> Scale:
        return QUICK if self.quick else FULL

    def run(self, head: Record) -> Iterator[Record]:
        """Measure what an earlier run of the same folder has not, and yield its records; `records` holds all.

        Raises:
            InputError: the folder holds results of another kind of run, or `only` names nothing.
        """
        self._resume(head | {"quick": self.quick})
        try:
            for rounds, cases in parts(self.scale):
                for turn in range(self.rounds or rounds if rounds > 1 else 1):
                    yield from self._round(turn, cases)
        finally:
            for server in self._servers.values():
                server.communicate(timeout=30)  # closes its input, which ends it
        expected = "such as 'Ingot rate uint16 T=1024'"
        require(bool(self.records), f"--only {self.only!r} is found in no 'system task item T=...', {expected}")

    def _resume(self, head: Record) -> None:
        path = self.out / "results.jsonl"
        if not path.exists():
            begin(path, head)
        try:
            self.head, self.records = read(path)
            same = all(self.head[key] == head[key] for key in ("quick", "cpu"))
            kind = "quick" if self.head["quick"] else "full"
        except (ValueError, KeyError) as error:
            raise InputError(f"{path} is damaged ({error}); remove it or choose another --out") from error
        require(same, f"{path} is of another machine or of a {kind} run; choose another --out")
        # A package that was absent may have been installed since.
        self.records = [record for record in self.records if "absent" not in record]

    def _round(self, turn: int, cases: list[Case]) -> Iterator[Record]:
        names = [name for name in SYSTEMS if not self.quick or name in QUICK_SYSTEMS]
        for case in cases:
            for name in rotated(names, turn):
                wanted = runs(name, case) and re.search(self.only, f"{name} {case.label}")
                if wanted and not self._settled(name, case, turn):
                    record = {"system": name, "label": case.label, "round": turn} | asdict(case)
                    record |= self._measured(name, case) | {"load": os.getloadavg()[0]}
                    self.records.append(record)
                    append(self.out / "results.jsonl", record)
                    yield record

    def _settled(self, name: str, case: Case, turn: int) -> bool:
        """Whether this was measured, or is pointless: no package, failed before, or wrong batches of this kind."""
        checked = Case("check", case.item, case.seq_len, case.documents).label
        hopeless = (replace(case, resume=False).label, case.label, checked)  # what cannot start cannot start resumed
        return any(
            "absent" in record
            or (record.keys() & FAILURES and record["label"] in hopeless)
            or (record["label"], record["round"]) == (case.label, turn)
            for record in self.records
            if record["system"] == name
        )

    def _measured(self, name: str, case: Case) -> Record:
        tokens = case.token_set(self.scale, self.out / "tokens")
        key = (SYSTEMS[name].module, tokens, case.seq_len)
        if key not in self._prepared:
            tokens.make()
            found = self._ask(name, "prepare", case, PREPARING_SECONDS)
            if found.keys() & FAILURES:
                return found
            os.sync()  # else pages that are not written yet could not be dropped
            self._prepared.add(key)
        return self._ask(name, "measure", case, MEASURING_SECONDS)

    def _ask(self, name: str, action: str, case: Case, patience: float) -> Record:
        server = self._server(SYSTEMS[name].module)
        request = {"system": name, "action": action, "case": asdict(case), "quick": self.quick, "patience": patience}
        assert server.stdin is not None and server.stdout is not None
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        line = server.stdout.readline()
        if not line:
            raise RuntimeError(f"the process of {name} has ended; see {self.out}/{SYSTEMS[name].module}.log")
        return json.loads(line)

    def _server(self, module: str) -> subprocess.Popen:
        if module not in self._servers:
            core = max(os.sched_getaffinity(0))
            command = [sys.executable, "-m", "benchmarks.loader.server", module, str(core), str(self.out / "tokens")]
            with (self.out / f"{module}.log").open("w") as log:
                self._servers[module] = subprocess.Popen(
                    command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
                )
        return self._servers[module]
