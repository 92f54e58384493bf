"""The tags of what a run records."""

import pytest

from titans_pretrain.watch import panel


@pytest.mark.parametrize(
    ("what", "tag"),
    [
        ("theta/p90", "memory_theta/blocks.3.p90"),
        ("drift", "memory_drift/blocks.3"),
        ("surprise", "memory_surprise/blocks.3"),
        ("surprise_untrained", "memory_surprise/blocks.3.untrained"),
    ],
)
def test_a_group_for_each_figure_and_the_layer_in_it(what, tag):
    assert panel(what, "blocks.3.mixer.memory") == tag
