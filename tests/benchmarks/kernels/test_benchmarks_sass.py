"""What is read from machine code: the shortest way round a loop, its products, and the bound of the model."""

from __future__ import annotations

from collections import Counter

import pytest

from benchmarks.kernels.sass import Loop, loops

LISTING = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   HGMMA.64x32x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT ;
        /*0020*/                   HGMMA.64x128x16.F32.BF16 R24, R88, gdesc[UR4].tnspB, R24, gsb0 ;
        /*0030*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0040*/               @P0 BRA `(.L_x_2) ;
        /*0050*/                   FSEL R3, R4, RZ, P1 ;
        /*0060*/                   STL [R1], R3 ;
.L_x_2:
        /*0070*/                   MUFU.EX2 R2, R2 ;
        /*0080*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0090*/              @!P2 BRA `(.L_x_1) ;
        /*00a0*/                   EXIT ;
.L_x_3:
        /*00b0*/                   BRA `(.L_x_3) ;
"""


def test_a_loop_by_hand() -> None:
    (loop,) = loops(LISTING)  # the last one has no product
    assert loop == Loop(
        instructions=7,
        products=Counter({(32, True): 1, (128, False): 1}),
        waits=1,
        barriers=1,
        exponentials=1,
        spills=1,
    )


def test_a_loop_around_another_is_left_out() -> None:
    (loop,) = loops(
        LISTING.replace("/*00a0*/                   EXIT", "/*00a0*/               @P3 BRA `(.L_x_0)", 1).replace(
            "        /*0000*/", ".L_x_0:\n        /*0000*/"
        )
    )
    assert loop.instructions == 7


def test_the_bound_by_hand() -> None:
    """Four warps: products take 24 + 64 clocks of which 16 + 64 compute, issue takes 100, exponentials 4 x 2 x 20."""
    loop = Loop(100, Counter({(32, True): 1, (128, False): 1}), 1, 1, 20, 0)
    assert loop.of_peak(4) == pytest.approx((80 / 188, 80 / 160))
    assert "1 n32 from shared 1 n128, 1 waits" in loop.text(4)
