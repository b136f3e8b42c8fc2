"""The picture of the forward kernel's schedule in docs/ is the one that the kernel makes now."""

from __future__ import annotations

from xml.etree import ElementTree

from drawing import SVG, drawn


def test_the_picture_is_current() -> None:
    assert SVG.read_text(encoding="utf-8") == drawn(), "run: python tests/kernels/gluon/drawing.py"


def test_the_picture_shows_both_consumers_products_beside_the_others_softmax() -> None:
    texts = [element.text for element in ElementTree.parse(SVG).iter() if element.tag.endswith("text")]
    for wanted in ("producer", "consumer 0", "consumer 1", "K 5", "V 5"):
        assert wanted in texts
    assert texts.count("QK 5") == texts.count("PV 5") == 2
    assert any("not measured" in text for text in texts)
