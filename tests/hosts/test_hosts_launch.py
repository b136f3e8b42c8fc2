"""Ranks on two hosts meet, whichever launcher starts them."""

import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.cluster
PROBE = "tests/cluster/rank_probe.py"


def reports(folder: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("rank-*.json"))]


def check(found: list[dict], hosts, launcher: str) -> None:
    assert [(r["rank"], r["local_rank"]) for r in found] == [(0, 0), (1, 0)]
    assert {(r["world_size"], r["local_world_size"]) for r in found} == {(2, 1)}
    assert {r["master_addr"] for r in found} == {hosts.addresses[0]}
    assert {r["launcher"] for r in found} == {launcher}
    assert {r["sum"] for r in found} == {3.0}
    assert all(r["arguments"][1:] == ["--a.b=c d"] for r in found)


def test_deepspeed_hostfile(two_hosts, tmp_path, port):
    options = ["--hostfile", two_hosts.hostfile, "--master_port", port]
    two_hosts.run(0, ["deepspeed", *options, PROBE, tmp_path, "--a.b=c d"])
    found = reports(tmp_path)
    check(found, two_hosts, "deepspeed")
    # The launcher's part on each host, and the ssh session that it runs in.
    assert all(len(report["watched"]) >= 2 for report in found)


def test_torchrun(two_hosts, tmp_path, port):
    place = ["--master_addr", two_hosts.addresses[0], "--master_port", port]

    def command(host: int) -> list:
        nodes = ["--nnodes", "2", "--node_rank", host, "--nproc_per_node", "1"]
        return ["torchrun", *nodes, *place, PROBE, tmp_path, "--a.b=c d"]

    two_hosts.run_all({0: command(0), 1: command(1)})
    check(reports(tmp_path), two_hosts, "torchrun")
