"""From what the user asks for to numbers of tokens: against the counts that the papers state for DeiT, and what must hold for any."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekit.errors import UsageError
from edgekit.passes.prune_tokens import schedule
from edgekit.passes.prune_tokens.schedule import Sizes, Step

DEIT = Sizes(12, 197, 1)


def after(steps, sizes, fuse=False):
    """Tokens after each block."""
    left, found = sizes.tokens, []
    for block in range(sizes.blocks):
        for step in steps:
            if step.block == block:
                left = sizes.prefix + step.targets + fuse
        found.append(left)
    return found


@pytest.mark.parametrize(
    ("keep", "stages"),
    [(0.9, (179, 163, 148)), (0.8, (159, 129, 105)), (0.7, (140, 100, 72)), (0.6, (120, 74, 46)), (0.5, (100, 52, 28))],
)
def test_shares_of_what_is_left_with_a_token_of_the_others(keep, stages):
    """EViT-DeiT (Liang et al. 2022): after blocks 3, 6 and 9, the extra token counted with the others."""
    steps = schedule.by_ratio(DEIT, (3, 6, 9), [keep] * 3, True)
    assert after(steps, DEIT, True) == [197] * 3 + [stages[0]] * 3 + [stages[1]] * 3 + [stages[2]] * 3
    assert not any(step.before for step in steps)


@pytest.mark.parametrize(
    ("keep", "stages"), [((0.9, 0.7, 0.5), (177, 138, 99)), ((0.8, 0.6, 0.4), (157, 118, 79)), ((0.7, 0.5, 0.3), (138, 99, 59))]
)
def test_shares_of_all_tokens(keep, stages):
    """IA-RED² on DeiT: in front of each group of four blocks."""
    steps = schedule.of_all(DEIT, (0, 4, 8), keep)
    assert after(steps, DEIT) == [count for count in stages for _ in range(4)]
    assert all(step.before for step in steps)


@pytest.mark.parametrize(
    ("pairs", "counts"),
    [
        (8, [189, 181, 173, 165, 157, 149, 141, 133, 125, 117, 109, 101]),
        (13, [184, 171, 158, 145, 132, 119, 106, 93, 80, 67, 54, 41]),
        (16, [181, 165, 149, 133, 117, 101, 85, 69, 53, 37, 21, 11]),
    ],
)
def test_pairs(pairs, counts):
    """ToMe on DeiT (Bolya et al. 2023); the last 16 are only 10, half of the 20 patches that are left."""
    assert after(schedule.by_pairs(DEIT, [pairs] * 12), DEIT) == counts


def test_counts_never_grow():
    """The ready-made counts of DiffRate for DeiT-S at 2.9 G (Chen et al. 2023)."""
    prune = (197, 196, 190, 168, 150, 139, 129, 117, 99, 78, 58, 3)
    merge = (197, 194, 176, 156, 141, 133, 121, 107, 88, 64, 56, 3)
    steps = schedule.by_counts(DEIT, prune, merge)
    assert after(steps, DEIT) == list(merge)
    assert [step.keep for step in steps] == [195, 189, 167, 149, 138, 128, 116, 98, 77, 57, 2]
    assert schedule.by_counts(Sizes(3, 20, 2), (25, 10, 15), (22, 12, 11)) == [Step(1, False, 8, 8)]


def test_layers_at_parts_of_the_depth():
    assert schedule.spread(12, (1 / 4, 1 / 2, 3 / 4)) == (3, 6, 9)
    assert schedule.spread(24, (0, 1 / 3, 2 / 3)) == (0, 8, 16)
    assert schedule.spread(1, (1 / 4, 1 / 2, 3 / 4)) == (0,)


def test_a_ratio_for_each_layer():
    assert schedule.per_layer(0.5, (1, 2), (0.7,)) == [0.5, 0.5]
    assert schedule.per_layer(None, (1, 2), (0.7,)) == [0.7, 0.7]
    assert schedule.per_layer((0.9, 0.8), (1, 2), (0.7,)) == [0.9, 0.8]
    with pytest.raises(UsageError, match="3 ratios do not fit 2 layers"):
        schedule.per_layer((0.9, 0.8, 0.7), (1, 2), (0.7,))


@pytest.mark.parametrize("layers", [(12,), (-1,), (3, 2), (3, 3)])
def test_layers_that_cannot_be(layers):
    with pytest.raises(UsageError):
        schedule.check_layers(layers, DEIT)


@given(
    blocks=st.integers(1, 8),
    patches=st.integers(1, 60),
    prefix=st.integers(0, 5),
    data=st.data(),
)
def test_steps_are_in_order_and_only_remove(blocks, patches, prefix, data):
    sizes = Sizes(blocks, prefix + patches, prefix)
    ratios = data.draw(st.lists(st.floats(0.01, 1), min_size=blocks, max_size=blocks))
    numbers = data.draw(st.lists(st.integers(0, 80), min_size=blocks, max_size=blocks))
    others = data.draw(st.lists(st.integers(0, 80), min_size=blocks, max_size=blocks))
    made = {
        "ratio": schedule.by_ratio(sizes, range(blocks), ratios, False),
        "fused": schedule.by_ratio(sizes, range(blocks), ratios, True),
        "all": schedule.of_all(sizes, range(blocks), ratios),
        "pairs": schedule.by_pairs(sizes, numbers),
        "counts": schedule.by_counts(sizes, numbers, others),
    }
    for name, steps in made.items():
        assert [step.block for step in steps] == sorted({step.block for step in steps})
        left = patches
        for step in steps:
            now = step.targets + (name == "fused")
            assert step.targets <= step.keep <= left
            assert step.targets < left
            left = now
        if name in ("ratio", "fused", "pairs"):
            schedule.check_steps(steps)  # these always leave a token


def test_a_schedule_that_leaves_no_token():
    with pytest.raises(UsageError, match="leaves no token in block 4"):
        schedule.check_steps(schedule.of_all(Sizes(12, 5, 1), (0, 4), (0.9, 0.2)))
