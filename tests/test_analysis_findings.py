"""A report's verdicts, sentences and suggested split, from known numbers."""

import math

import matplotlib.pyplot as plt
import pytest
import torch

from scd.analysis.ablations import (
    describe_masking,
    describe_recovery,
    maskable_depth,
    skip_ranges,
)
from scd.analysis.attention_mass import AttentionMass, describe_attention
from scd.analysis.context_ablation import describe_history
from scd.analysis.figures import attention_on_past, similarity_to_last
from scd.analysis.similarity import (
    StepSimilarity,
    between_steps,
    deepest_steady_layer,
    describe_similarity,
    plateaus,
)
from scd.analysis.split import Split
from scd.analysis.suggest_split import candidates, decoder_depth, describe_depth, fastest_good
from scd.errors import ScdError


def similarity_of(similarity, between_clips):
    """Make a result from layers (1 + L, T, T) and one similarity of different clips for all."""
    layers, steps, _ = similarity.shape
    nothing = torch.zeros(layers, steps)
    return StepSimilarity(similarity, nothing, similarity, torch.full((layers,), between_clips))


def of_kinds(kinds, within, between):
    """Make steps of one kind as similar as `within`, and those of two kinds as `between`."""
    kinds = torch.tensor(kinds)
    equal = kinds == kinds[:, None]
    return torch.where(equal, within, between).fill_diagonal_(1.0)


def paper_pattern(between_clips=0.5):
    """Layers 1 and 2 above 0.95 over the first 40 of 50 steps, then 0.8; layer 3 changes always;
    the last step is like none."""
    steady = of_kinds([0] * 40 + [1] * 9 + [2], 0.97, 0.8)
    moving = of_kinds(range(50), 1.0, 0.7)
    return similarity_of(torch.stack([moving, steady, steady, moving]), between_clips)


def test_plateaus():
    result = paper_pattern()
    embedding, one, two, three = plateaus(result)
    assert (one.share, one.first, one.last, one.threshold) == (39 / 48, 1, 40, 0.95)
    assert one.wide and two.wide and not three.wide and embedding.share == 0
    assert deepest_steady_layer(result) == 2
    between = between_steps(result.similarity)
    pairs = (40 * 39 + 9 * 8) / (49 * 48)
    assert between[0] == pytest.approx(0.7)
    assert between[1] == pytest.approx(0.97 * pairs + 0.8 * (1 - pairs))
    # Where different clips are as similar as that, 0.97 is nothing special.
    assert [plateau.threshold for plateau in plateaus(paper_pattern(0.96))] == [
        pytest.approx(0.98)
    ] * 4
    assert deepest_steady_layer(paper_pattern(0.96)) == 0
    # The last step does not count, however similar it is.
    alike = of_kinds([0, 1, 2, 3], 1.0, 0.5)
    alike[-1] = alike[:, -1] = 1.0
    assert plateaus(similarity_of(alike[None], 0.0))[0].share == 0


def test_sentences_about_features():
    names = ["embedding", "layer 1", "layer 2", "layer 3"]
    text = describe_similarity(paper_pattern(), names, 16, is_scd=False)
    assert "steps) holds here: layer 1 stays above a similarity of 0.95 at 81 % of the" in text
    assert "(1 to 40 of 50; needed: 75 %)" in text and "layer 3 0.70; of two" in text
    assert text.endswith("0.50 (n = 16 clips).")
    text = describe_similarity(paper_pattern(0.96), names, 16, is_scd=False)
    assert "does not hold here: no two steps of any layer are more similar than 0.98" in text
    assert "first finding" not in describe_similarity(paper_pattern(), names, 16, is_scd=True)


def mass_of(by_layer, past=4):
    """Two passes, three heads; a tenth of what is on the past goes to the newest of it."""
    on_past = torch.tensor(by_layer)[None, :, None, None].expand(2, -1, 3, 1)
    older = on_past * 0.9 / (past - 1)
    return AttentionMass([torch.cat([*[older] * (past - 1), 0.1 * on_past, 1 - on_past], -1)])


def test_attention_is_plotted_by_distance():
    """The last frame's tokens are those of the new frame itself."""
    mass = torch.tensor([0.1, 0.2, 0.7]).expand(1, 1, 1, 3)
    figure = attention_on_past(mass, mass, ["1"], steps=False, n=1)
    line = figure.axes[2].lines[0]
    plt.close(figure)
    found = dict(zip(line.get_xdata().tolist(), line.get_ydata().tolist(), strict=True))
    assert found == pytest.approx({2: 0.1, 1: 0.2, 0: 0.7})


def test_each_layer_has_a_band_of_its_own_error():
    similarity = torch.tensor([0.5, 0.8])[:, None, None].expand(2, 3, 3)
    error = torch.tensor([[0.1] * 3, [0.02] * 3])
    figure = similarity_to_last(similarity, error, similarity, torch.zeros(2), ["1", "2"], n=4)
    bands = [band.get_paths()[0].vertices[:, 1] for band in figure.axes[0].collections]
    plt.close(figure)
    found = [(float(band.min()), float(band.max())) for band in bands]
    assert found == [pytest.approx((0.4, 0.6)), pytest.approx((0.78, 0.82))]


def test_sentences_about_attention():
    falling = describe_attention(mass_of([0.9, 0.8, 0.85, 0.6, 0.4, 0.2]), 16, is_scd=False)
    assert "past frames) holds here (rank correlation with depth -0.94, 6 layers)" in falling
    assert "layer by layer 90, 80, 85, 60, 40, 20 % goes to the 4 past frames (80 % if" in falling
    assert "on average 6 % to the newest of them (n = 16 clips)." in falling
    level = describe_attention(mass_of([0.9, 0.5, 0.8, 0.6, 0.95, 0.2]), 16, is_scd=False)
    assert "does not hold here (rank correlation with depth -0.26, 6 layers)" in level
    few = describe_attention(mass_of([0.9, 0.5, 0.2]), 16, is_scd=False)
    assert "cannot be judged from 3 layers" in few
    context = torch.tensor([0.6, 0.4])[:, None, None].expand(2, 1, 3)
    encoder = AttentionMass(mass_of([0.9, 0.5]).past, context)
    text = describe_attention(encoder, 16, is_scd=True)
    assert "50 % of its attention on the context tokens (60 % at the first step, 40 %" in text


def test_sentences_about_masked_layers():
    def recovery(now, before, steps=40):
        return describe_recovery(12, steps, {2: (now, 0.01), 6: (0.5, 0.01)}, {2: (before, 0.01)})

    assert "last 2: +3.0 ± 1.0 %, last 6: +50.0 ± 1.0 %" in recovery(0.03, 0.2)
    assert "holds for the last 2 layers." in recovery(0.03, 0.2)
    assert "is undecided: 40 steps are too few" in recovery(0.1, 0.2)
    assert "does not hold for the last 2 layers." in recovery(0.19, 0.2)
    assert "is undecided: 3 steps are hardly more than the warmup" in recovery(0.19, 0.2, steps=3)
    assert describe_recovery(12, 0, {}, {}) == ""
    cut = {1: (0.01, 0.0), 2: (0.04, 0.0), 3: (0.2, 0.0)}
    assert [maskable_depth(cut, {}), maskable_depth(cut, {3: (0.05, 0.0)})] == [2, 3]
    assert maskable_depth({1: (0.3, 0.0)}, {}) == 0
    jagged = {1: (0.2, 0.0), 2: (0.3, 0.0), 3: (0.04, 0.0)}
    assert maskable_depth(jagged, {}) == 0  # the first one already costs too much
    assert "in the last of 3 layers the loss changes by +1.0 ± 0.0 %" in describe_masking(
        3, "layers", 16, cut
    )


def test_sentences_about_history():
    text = describe_history({1: (0.2, 0.01), 2: (0.04, 0.01), 4: (0.01, 0.01)}, 8)
    assert "1: +20.0 ± 1.0 %, 2: +4.0" in text
    assert "newest of 8 frames: 1: " in text
    assert "frames before the newest 2 reduce the loss by less than 5 %" in text
    assert "the longest of these costs more than 5 %" in describe_history({1: (0.2, 0.0)}, 8)
    jagged = {1: (0.5, 0.0), 2: (0.04, 0.0), 4: (0.3, 0.0), 8: (0.01, 0.0)}
    assert "before the newest 8 " in describe_history(jagged, 16)


def test_ranges_of_skipped_layers():
    assert skip_ranges(30) == [(0, 8), (8, 22), (22, 30)]
    assert skip_ranges(7) == [(0, 2), (2, 5), (5, 7)]
    assert (skip_ranges(2), skip_ranges(1)) == ([(0, 1), (1, 2)], [(0, 1)])


# The suggestion


def test_splits_that_are_measured():
    assert [decoder_depth(6, steady) for steady in (0, 2, 5, 6)] == [5, 4, 1, 1]
    ends = "first-and-last"
    assert candidates(6, 4) == [Split(2, 4), Split(4, 2), Split(5, 1), Split(4, 4, ends)]
    assert candidates(2, 1) == [Split(1, 1), Split(1, 2, ends)]
    for layers in range(2, 12):
        for depth in range(1, layers):
            for split in candidates(layers, depth):
                split.decoder_sources(layers)  # no refusal


def test_the_fastest_good_split_is_suggested():
    deep, half, light = Split(2, 4), Split(4, 2), Split(5, 1)
    seconds = {deep: 0.4, half: 0.2, light: 0.1}
    assert fastest_good({deep: 1.0, half: 1.04, light: 1.2}, seconds) == half
    assert fastest_good({deep: 1.0, half: 1.06, light: 1.2}, seconds) == deep
    assert fastest_good({deep: 1.3, half: 1.2, light: 1.0}, seconds) == light
    for losses in ({deep: math.nan, light: 1.2}, {light: 1.2, deep: math.nan}):
        assert fastest_good(losses, seconds) == light
    with pytest.raises(ScdError, match="has diverged"):
        fastest_good({deep: math.nan, light: math.inf}, seconds)


def test_the_reason_for_a_suggestion():
    assert "Layer 4 is the last of 6" in describe_depth(6, 4, 2)
    assert "suggests 2 decoder layers" in describe_depth(6, 4, 2)
    assert "Warning" not in describe_depth(6, 4, 2)
    assert "Warning: only the last 1 can do without attention to the past" in describe_depth(
        6, 4, 1
    )
    assert "None of the 6 layers" in describe_depth(6, 0, 0)
    assert "Warning: none of the layers" in describe_depth(6, 0, 0)
