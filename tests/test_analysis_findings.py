"""What a report says of numbers that are known: verdicts, sentences, the suggested split."""

import pytest
import torch

from scd.analysis.ablations import blind_depth, skip_ranges, told_blind, told_recovery
from scd.analysis.attention_mass import AttentionMass
from scd.analysis.context_probe import told_history
from scd.analysis.observations import steady_layers, told_attention, told_features
from scd.analysis.similarity import Redundancy, between_steps, plateaus
from scd.analysis.split import Split
from scd.analysis.suggest import candidates, fastest_good, told_reason, wanted_decoder


def redundancy_of(similarity, floor):
    """Of layers (1 + L, T, T) and a floor for all."""
    layers, steps, _ = similarity.shape
    nothing = torch.zeros(layers, steps)
    return Redundancy(similarity, nothing, similarity, torch.full((layers,), floor))


def of_kinds(kinds, within, between):
    """Steps of one kind are as similar as `within`, those of two as `between`."""
    kinds = torch.tensor(kinds)
    equal = kinds == kinds[:, None]
    return torch.where(equal, within, between).fill_diagonal_(1.0)


def paper_pattern(floor=0.5):
    """Layers 1 and 2 above 0.95 over the first 40 of 50 steps, then 0.8; layer 3 changes always;
    the last step is like none."""
    steady = of_kinds([0] * 40 + [1] * 9 + [2], 0.97, 0.8)
    moving = of_kinds(range(50), 1.0, 0.7)
    return redundancy_of(torch.stack([moving, steady, steady, moving]), floor)


def test_plateaus():
    found = paper_pattern()
    embedding, one, two, three = plateaus(found)
    assert (one.share, one.first, one.last, one.bar) == (39 / 48, 1, 40, 0.95)
    assert one.wide and two.wide and not three.wide and embedding.share == 0
    assert steady_layers(found) == 2
    between = between_steps(found.similarity)
    pairs = (40 * 39 + 9 * 8) / (49 * 48)
    assert between[0] == pytest.approx(0.7)
    assert between[1] == pytest.approx(0.97 * pairs + 0.8 * (1 - pairs))
    # Where different clips are as similar as that, 0.97 is nothing special.
    assert [plateau.bar for plateau in plateaus(paper_pattern(0.96))] == [pytest.approx(0.98)] * 4
    assert steady_layers(paper_pattern(0.96)) == 0
    # The last step is not asked, however alike it is.
    alike = of_kinds([0, 1, 2, 3], 1.0, 0.5)
    alike[-1] = alike[:, -1] = 1.0
    assert plateaus(redundancy_of(alike[None], 0.0))[0].share == 0


def test_sentences_about_features():
    names = ["embedding", "layer 1", "layer 2", "layer 3"]
    told = told_features(paper_pattern(), names, 16, separate=False)
    assert "steps) holds here: layer 1 stays above a similarity of 0.95 at 81 % of the" in told
    assert "(1 to 40 of 50; asked for: 75 %)" in told and "layer 3 0.70; of two" in told
    assert told.endswith("0.50 (n = 16 clips).")
    told = told_features(paper_pattern(0.96), names, 16, separate=False)
    assert "does not hold here: no two steps of any layer are more similar than 0.98" in told
    assert "first finding" not in told_features(paper_pattern(), names, 16, separate=True)


def mass_of(by_layer, past=4):
    """Two passes, three heads; a tenth of what is on the past goes to the newest of it."""
    on_past = torch.tensor(by_layer)[None, :, None, None].expand(2, -1, 3, 1)
    older = on_past * 0.9 / (past - 1)
    return AttentionMass([torch.cat([*[older] * (past - 1), 0.1 * on_past, 1 - on_past], -1)])


def test_sentences_about_attention():
    falling = told_attention(mass_of([0.9, 0.8, 0.85, 0.6, 0.4, 0.2]), 16, separate=False)
    assert "past frames) holds here (rank correlation with depth -0.94, 6 layers)" in falling
    assert "layer by layer 90, 80, 85, 60, 40, 20 % goes to the 4 past frames (80 % if" in falling
    assert "on average 6 % to the newest of them (n = 16 clips)." in falling
    level = told_attention(mass_of([0.9, 0.5, 0.8, 0.6, 0.95, 0.2]), 16, separate=False)
    assert "does not hold here (rank correlation with depth -0.26, 6 layers)" in level
    few = told_attention(mass_of([0.9, 0.5, 0.2]), 16, separate=False)
    assert "cannot be judged on 3 layers" in few
    context = torch.tensor([0.6, 0.4])[:, None, None].expand(2, 1, 3)
    encoder = AttentionMass(mass_of([0.9, 0.5]).past, context)
    told = told_attention(encoder, 16, separate=True)
    assert "50 % of its attention on the context tokens (60 % at the first step, 40 %" in told


def test_sentences_about_blind_layers():
    def recovery(now, before, steps=40):
        return told_recovery(12, steps, {2: (now, 0.01), 6: (0.5, 0.01)}, {2: (before, 0.01)})

    assert "last 2: +3.0 ± 1.0 %, last 6: +50.0 ± 1.0 %" in recovery(0.03, 0.2)
    assert "holds for the last 2 layers." in recovery(0.03, 0.2)
    assert "not decided: 40 steps are too few to tell" in recovery(0.1, 0.2)
    assert "does not hold for the last 2 layers." in recovery(0.19, 0.2)
    assert "not decided: 3 steps are hardly more than the warmup" in recovery(0.19, 0.2, steps=3)
    assert told_recovery(12, 0, {}, {}) == ""
    cut = {1: (0.01, 0.0), 2: (0.04, 0.0), 3: (0.2, 0.0)}
    assert [blind_depth(cut, {}), blind_depth(cut, {3: (0.05, 0.0)})] == [2, 3]
    assert blind_depth({1: (0.3, 0.0)}, {}) == 0
    assert "last of 3 layers costs +1.0 ± 0.0 % of loss" in told_blind(3, "layers", 16, cut)


def test_sentences_about_history():
    told = told_history({1: (0.2, 0.01), 2: (0.04, 0.01), 4: (0.01, 0.01)}, 8)
    assert "1: +20.0 ± 1.0 %, 2: +4.0" in told
    assert "newest of 8 frames: 1: " in told
    assert "what lies before the newest 2 gains less than 5 %" in told
    assert "each of these loses more than 5 %" in told_history({1: (0.2, 0.0)}, 8)


def test_ranges_of_skipped_layers():
    assert skip_ranges(30) == [(0, 8), (8, 22), (22, 30)]
    assert skip_ranges(7) == [(0, 2), (2, 5), (5, 7)]
    assert (skip_ranges(2), skip_ranges(1)) == ([(0, 1), (1, 2)], [(0, 1)])


# The suggestion


def test_splits_that_are_measured():
    assert [wanted_decoder(6, steady) for steady in (0, 2, 5, 6)] == [5, 4, 1, 1]
    ends = "first-and-last"
    assert candidates(6, 4) == [Split(2, 4), Split(4, 2), Split(5, 1), Split(4, 4, ends)]
    assert candidates(2, 1) == [Split(1, 1), Split(1, 2, ends)]
    for layers in range(2, 12):
        for wanted in range(1, layers):
            for split in candidates(layers, wanted):
                split.decoder_sources(layers)  # no refusal


def test_the_fastest_good_split_is_suggested():
    deep, half, light = Split(2, 4), Split(4, 2), Split(5, 1)
    seconds = {deep: 0.4, half: 0.2, light: 0.1}
    assert fastest_good({deep: 1.0, half: 1.04, light: 1.2}, seconds) == half
    assert fastest_good({deep: 1.0, half: 1.06, light: 1.2}, seconds) == deep
    assert fastest_good({deep: 1.3, half: 1.2, light: 1.0}, seconds) == light


def test_the_reason_of_a_suggestion():
    assert "Layer 4 is the last of 6" in told_reason(6, 4, 2)
    assert "speaks for 2 decoder layers" in told_reason(6, 4, 2)
    assert "Warning" not in told_reason(6, 4, 2)
    assert "Warning: only the last 1 can do without the past" in told_reason(6, 4, 1)
    assert "None of the 6 layers" in told_reason(6, 0, 0)
    assert "Warning: none of the layers" in told_reason(6, 0, 0)
