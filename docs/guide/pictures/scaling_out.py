"""Chapter 9: what each of four ranks holds of gpt2-124m under every layout, by the formulas of llm/plan/memory.py."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from docs.guide.pictures.frame import ROOT, Run, blank
from llm.config.parse import parse_config
from llm.plan.memory import gathered, rank_memory, training_state

RUNS: tuple[Run, ...] = ()
WORDS = {"plain": "--train.engine=plain", "fsdp": "--train.engine=fsdp", "sp": "--parallel.sequence_parallel=true"}
# Each layout's ranks, tensor-parallel size, ZeRO stage, and what else is set.
LAYOUTS: dict[str, tuple[int, int, int, tuple[str, ...]]] = {
    "one GPU": (1, 1, 0, ("plain",)),
    "data parallel": (4, 1, 0, ("plain",)),
    "ZeRO 1": (4, 1, 1, ()),
    "ZeRO 2": (4, 1, 2, ()),
    "ZeRO 3": (4, 1, 3, ()),
    "FSDP": (4, 1, 3, ("fsdp",)),
    "TP 4": (4, 4, 1, ()),
    "TP 4 + SP": (4, 4, 1, ("sp",)),
    "TP 2 x DP 2": (4, 2, 1, ()),
}
# Okabe and Ito's colours, which a colour-blind person can tell apart.
COLOURS = {
    "weights": "#0072B2", "working copies": "#56B4E9", "gradients": "#E69F00", "optimizer state": "#D55E00",
    "activations": "#009E73",
}  # fmt: skip
ROWS = ("weights", "gradients", "optimizer state", "activations")


class Held(NamedTuple):
    """What one rank holds."""

    ranks: int
    tp: int
    bytes: dict[str, int]
    """By the names of COLOURS. The optimizer state has the fp32 masters. Working copies live for a part of a step."""


def held(ranks: int, tp: int, stage: int, words: tuple[str, ...]) -> Held:
    layout = [f"--parallel.tensor_parallel={tp}", f"--parallel.zero_stage={stage}", *(WORDS[word] for word in words)]
    config = parse_config(["--config", str(ROOT / "launch/configs/gpt2-124m.yaml"), *layout])
    state, all_of_it = training_state(config, ranks), rank_memory(config, ranks)
    masters = state.moments // 2
    sizes = {
        "weights": state.weights - masters,
        "working copies": gathered(config) + all_of_it["the last micro-batch's"],
        "gradients": state.gradients,
        "optimizer state": masters + state.moments,
        "activations": all_of_it["activations"] + all_of_it["head_loss"],
    }
    assert sum(sizes.values()) == sum(all_of_it.values())
    return Held(ranks, tp, sizes)


def panel(axes: Axes, name: str, layout: Held, whole: dict[str, int]) -> None:
    """Four boxes, a rank each, with a strip for each row: how much of the whole it holds, and which part."""
    for rank in range(4):
        there, (group, tp_rank) = rank < layout.ranks, divmod(rank, layout.tp)
        order = tp_rank * (layout.ranks // layout.tp) + group  # data-parallel ranks share a tensor-parallel slice
        for row, kind in enumerate(ROWS):
            axes.add_patch(Rectangle((rank * 1.15, -row), 1, 0.72, fc="#F2F2F2" if there else "white", ec="#BBBBBB"))
            share = layout.bytes[kind] / whole[kind]
            part = order * round(1 / share) // layout.ranks if share and kind != "activations" else 0
            if there:
                colour, fraction = COLOURS[kind], min(share, 1)
                axes.add_patch(Rectangle((rank * 1.15 + part * fraction, -row), fraction, 0.72, fc=colour, lw=0))
            if there and kind == "activations" and layout.ranks > 1:
                axes.text(rank * 1.15 + 0.08, -row + 0.33, "abcd"[group], va="center", fontsize=9, color="white")
    sizes = sum(layout.bytes.values())
    axes.set_title(f"{name}: {sizes / 1e9:.2f} GB a rank", fontsize=10)
    axes.set(xlim=(-0.05, 4.5), ylim=(-3.1, 0.8), xticks=[], yticks=[])
    axes.axis("off")


def layouts(found: dict[str, Held]) -> Figure:
    figure, whole = blank(8, 6), found["one GPU"].bytes
    for axes, (name, layout) in zip(figure.subplots(3, 3).flat, found.items(), strict=True):
        panel(axes, name, layout, whole)
    handles = [Rectangle((0, 0), 1, 1, fc=COLOURS[kind]) for kind in ROWS]
    figure.legend(handles, ROWS, loc="outside lower center", ncols=4, frameon=False, fontsize=10)
    return figure


def memory(found: dict[str, Held]) -> Figure:
    """A bar of bytes for each layout."""
    figure = blank(8, 4.2)
    axes, left = figure.subplots(), dict.fromkeys(found, 0.0)
    for kind, colour in COLOURS.items():
        widths = [layout.bytes[kind] / 1e9 for layout in found.values()]
        axes.barh([*found], widths, 0.7, [*left.values()], color=colour, edgecolor="white", label=kind)
        left = {name: left[name] + width for name, width in zip(found, widths, strict=True)}
    for row, total in enumerate(left.values()):
        axes.text(total + 0.06, row, f"{total:.2f}", va="center", fontsize=9)
    axes.invert_yaxis()
    axes.set(xlabel="memory of a rank (GB = 10⁹ bytes)", xlim=(0, max(left.values()) * 1.09))
    figure.legend(loc="outside upper center", ncols=5, frameon=False, fontsize=9, handlelength=1)
    return figure


def draw(runs: dict[str, Path]) -> dict[str, Figure]:
    found = {name: held(*layout) for name, layout in LAYOUTS.items()}
    return {"layouts": layouts(found), "memory": memory(found)}
