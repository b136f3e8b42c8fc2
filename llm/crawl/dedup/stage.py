"""Duplicates go in three steps: signatures of each part; the clusters of all; each part without its duplicates."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from llm.crawl.counts import Counts
from llm.crawl.dedup.bands import join_bands
from llm.crawl.dedup.clusters import read_dropped, read_ids, write_clusters
from llm.crawl.dedup.measure import measure
from llm.crawl.dedup.settings import DedupConfig
from llm.crawl.dedup.signatures import Shape, open_signatures, read_texts, write_signatures
from llm.crawl.documents import Document, opened, read_documents, size_of
from llm.crawl.tasks import Task, write_report

CLUSTERS = "clusters.parquet"


def shape_of(config: DedupConfig) -> Shape:
    return Shape(config.shingle_words, config.bands, config.rows)


class Signatures:
    """A step of a part: NNNNN.signatures."""

    name, version = "signatures", 1

    def __init__(self, config: DedupConfig) -> None:
        self.settings = shape_of(config)

    def write(self, task: Task, counts: Counts) -> None:
        write_signatures(task.path(".signatures"), self.settings, read_texts(task.inputs[0]), counts)


@dataclass(frozen=True)
class ClusterSettings:
    shape: Shape
    sample: int


class Cluster:
    """A step of all parts at once: clusters.parquet; and curve.json, what `measure` found.

    Its inputs: the files of signatures, then the parts that they are of, in the same order.
    """

    name, version = "cluster", 1

    def __init__(self, config: DedupConfig) -> None:
        self.settings = ClusterSettings(shape_of(config), config.sample)
        self._memory = config.memory_mb << 20

    def write(self, task: Task, counts: Counts) -> None:
        half = len(task.inputs) // 2
        files = [open_signatures(path, self.settings.shape) for path in task.inputs[:half]]
        ids = read_ids(files)
        counts.documents_in = len(ids)
        counts.bytes_in = task.size
        runs = task.path(".runs.tmp")
        runs.mkdir()
        roots, sizes, exact = join_bands(files, self._memory, runs)
        runs.rmdir()
        write_clusters(task.folder / CLUSTERS, ids, roots, sizes, exact, counts)
        found = measure(files, task.inputs[half:], ids, roots, self.settings.sample)
        write_report(task.folder / "curve.json", found)


class Drop:
    """A stage of a part: its documents without those that a cluster has before them.

    A task's inputs: the part, and the file of the clusters.
    """

    name, version = "dedup", 1

    def __init__(self, config: DedupConfig) -> None:
        self.settings = shape_of(config)

    def run(self, task: Task, counts: Counts) -> Iterator[Document]:
        part, clusters = task.inputs
        with opened(part) as file:
            ids = file.read(columns=["id"], use_threads=False)["id"].to_numpy()
        dropped = read_dropped(clusters, ids)
        for document in read_documents(part):
            counts.documents_in += 1
            counts.bytes_in += size_of(document.text)
            if reason := dropped.get(document.id):
                counts.remove(f"dedup.{reason}", document)
            else:
                yield document
