"""What is read from machine code: the shortest way round a loop, its products, and the bound of the model."""

from __future__ import annotations

from collections import Counter

import pytest

from benchmarks.kernels.sass import Code, Loop, loops

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
    (loop,) = loops(Code(LISTING))  # the last one has no product
    assert loop == Loop(
        instructions=7,
        products=Counter({(32, True): 1, (128, False): 1}),
        waits=1,
        barriers=1,
        exponentials=1,
        spills=1,
    )


def test_a_loop_around_another_is_left_out() -> None:
    outer = LISTING.replace("/*00a0*/                   EXIT", "/*00a0*/               @P3 BRA `(.L_x_0)", 1)
    (loop,) = loops(Code(outer.replace("        /*0000*/", ".L_x_0:\n        /*0000*/")))
    assert loop.instructions == 7


def test_the_bound_by_hand() -> None:
    """Four warps: products take 24 + 64 clocks of which 16 + 64 compute, issue takes 100, exponentials 4 x 2 x 20."""
    loop = Loop(100, Counter({(32, True): 1, (128, False): 1}), 1, 1, 20, 0)
    assert loop.of_peak(4) == pytest.approx((80 / 188, 80 / 160))
    assert "1 n32 from shared 1 n128, 1 waits" in loop.text(4)


AWAY = """
.L_x_1:
        /*0010*/                   HGMMA.64x128x16.F32 R24, gdesc[UR8], RZ, !UPT ;
        /*0020*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR18+0x28120], R11 ;
        /*0030*/              @!P1 BRA `(.L_x_4) ;
.L_x_2:
        /*0040*/               @P2 BRA `(.L_x_3) ;
        /*0050*/                   MUFU.EX2 R2, R2 ;
.L_x_3:
        /*0060*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0070*/               @P0 BRA `(.L_x_1) ;
        /*0080*/                   BRX R2 -0x190    (*"BRANCH_TARGETS .L_x_6,.L_x_5"*);
.L_x_4:
        /*0090*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR18+0x28120], R11 ;
        /*00a0*/              @!P1 BRA `(.L_x_4) ;
        /*00b0*/                   BRA `(.L_x_2) ;
.L_x_5:
        /*00c0*/                   HGMMA.64x64x16.F32 R24, gdesc[UR8], RZ, !UPT ;
        /*00d0*/               @P0 BRA `(.L_x_5) ;
.L_x_6:
        /*00e0*/                   EXIT ;
"""


def test_a_loop_whose_wait_spins_elsewhere() -> None:
    """Code far away that jumps back is a part of the loop; its own jump to itself is no way round; a jump by a table
    leads on.
    """
    loop, other = loops(Code(AWAY))
    assert loop.instructions == 6 and other.instructions == 2
    assert loop.exponentials == 1 and other.exponentials == 0
