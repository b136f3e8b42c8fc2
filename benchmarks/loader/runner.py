"""Runs the cases: loaders in turns, each measurement in a process of its own, every result a line of JSON."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from benchmarks.loader.cases import FULL, QUICK, Case, Scale, parts
from benchmarks.loader.systems import QUICK as QUICK_SYSTEMS
from benchmarks.loader.systems import SYSTEMS, runs
from llm.errors import InputError, require

Record = dict[str, Any]
ROOT = Path(__file__).parents[2]  # of the checkout, from where `llm` is imported
PREPARING_SECONDS = 900.0  # after which the conversion of a corpus is ended
EACH_SECONDS = 0.5  # beside what is timed, that a measurement takes about


@dataclass
class Runner:
    """out: the folder of results.jsonl, continued where it ends, and of the corpora. minutes: a bound on rounds."""

    out: Path
    quick: bool
    minutes: float
    only: str = ""
    rounds: int | None = None
    """Of every part; None: as the scale says."""
    earlier: int = 0
    """Records that an earlier run left."""
    _began: float = field(default_factory=time.monotonic)
    _servers: dict[str, subprocess.Popen] = field(default_factory=dict)
    _records: list[Record] = field(default_factory=list)
    _given_up: set[tuple[str, str]] = field(default_factory=set)
    """(system, kin of the case) of what is not to be tried again; (system, "") of a loader that is not there."""
    _prepared: set[tuple] = field(default_factory=set)

    @property
    def scale(self) -> Scale:
        return QUICK if self.quick else FULL

    def run(self, machine: Record) -> Iterator[Record]:
        """Every record, those of an earlier run of the same folder first.

        Raises:
            InputError: the folder holds results of another kind of run, or `only` names nothing.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        self._load(machine)
        yield from self._records
        try:
            for number, (name, rounds, cases) in enumerate(parts(self.scale)):
                for turn in range(self.rounds or rounds if rounds > 1 else rounds):
                    began = time.monotonic()
                    yield from self._round(name, turn, cases)
                    if self._late(number, time.monotonic() - began):
                        break
        finally:
            for server in self._servers.values():
                _end(server)
        require(
            any("task" in record for record in self._records),
            f"--only {self.only!r} is found in no 'system task item T=...', such as 'Ingot rate uint16 T=1024'",
        )

    def _load(self, machine: Record) -> None:
        path = self.out / "results.jsonl"
        header = {"run": machine | {"quick": self.quick}}
        if not path.exists():
            self._write(header)
            return
        try:
            self._records += [json.loads(line) for line in path.read_text().splitlines()]
            self.earlier = len(self._records)
            before = self._records[0]["run"]
            require(
                before["quick"] == self.quick and before["cpu"] == machine["cpu"],
                f"{path} is of another machine or of a {'quick' if before['quick'] else 'whole'} run; "
                "choose another --out",
            )
        except (ValueError, KeyError, IndexError) as error:
            raise InputError(f"{path} is damaged ({error}); remove it or choose another --out") from error
        for record in self._records:
            if "absent" in record:
                continue  # it may have been installed since
            if record.keys() & {"wrong", "error"}:
                case = {field.name: record[field.name] for field in fields(Case)}
                self._given_up.add((record["system"], Case(**case).kin))

    def _late(self, part: int, round_seconds: float) -> bool:
        """Whether another round of this part would leave too little time for one round of each later part."""
        later = list(parts(self.scale))[part + 1 :]
        systems = [name for name in SYSTEMS if not self.quick or name in QUICK_SYSTEMS]
        measurements = sum(runs(name, case) for _, _, cases in later for case in cases for name in systems)
        reserved = measurements * (1.4 * self.scale.seconds + EACH_SECONDS)
        return time.monotonic() - self._began + round_seconds + reserved > 60 * self.minutes

    def _round(self, part: str, turn: int, cases: list[Case]) -> Iterator[Record]:
        done = {(r["system"], r["label"], r["round"]) for r in self._records if "label" in r and "absent" not in r}
        names = [name for name in SYSTEMS if not self.quick or name in QUICK_SYSTEMS]
        names = names[turn % len(names) :] + names[: turn % len(names)]  # nobody is always first
        for case in cases:
            for name in names:
                wanted = runs(name, case) and re.search(self.only, f"{name} {case.label}") is not None
                if not wanted or (name, case.label, turn) in done or self._pointless(name, case):
                    continue
                record = {"system": name, "label": case.label, "part": part, "round": turn} | asdict(case)
                record |= self._measured(name, case) | {"load": os.getloadavg()[0]}
                if "absent" in record:
                    self._given_up.add((name, ""))
                elif record.keys() & {"wrong", "error"}:
                    self._given_up.add((name, case.kin))
                self._write(record)
                yield record

    def _pointless(self, name: str, case: Case) -> bool:
        """Whether the loader is not there, failed at this before, or gives wrong batches of this kind."""
        checked = Case("check", case.item, case.seq_len, case.documents).label
        return bool(self._given_up & {(name, ""), (name, case.kin), (name, checked)})

    def _measured(self, name: str, case: Case) -> Record:
        tokens = case.token_set(self.scale, self.out / "tokens")
        key = (SYSTEMS[name].module, tokens, case.seq_len)
        if key not in self._prepared:
            tokens.make()
            found = self._ask(name, "prepare", case, PREPARING_SECONDS)
            if found.keys() & {"absent", "error"}:
                return found
            os.sync()  # else pages that are not written yet could not be dropped
            self._prepared.add(key)
        return self._ask(name, "measure", case, self.scale.patience)

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

    def _write(self, record: Record) -> None:
        self._records.append(record)
        with (self.out / "results.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")


def _end(server: subprocess.Popen) -> None:
    if server.stdin is not None:
        server.stdin.close()
    server.wait(timeout=30)
