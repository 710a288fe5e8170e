"""The probe of SCD's context: what the decoder loses when its context is not the right one."""

from scd.analysis import figures
from scd.analysis.bench import TOLERANCE, Bench, percent
from scd.analysis.context import CHANGES, context_given, contexts, of_newest
from scd.analysis.report import Section
from scd.flow.objective import LEVELS
from scd.models import SCD


def change_context(bench: Bench) -> Section:
    """Swap, zero, shuffle and delay the context of the first new frame; shorten its history."""
    model, clips = bench.model, bench.clips.cut(1)
    assert isinstance(model, SCD)
    of_one = Bench(bench.loaded, clips, bench.steps, bench.bar, last_frame=True)
    right = contexts(model, clips)
    given = {name: change(right) for name, change in CHANGES.items()}
    history = {f"{k} newest frame{'s' * (k > 1)}": k for k in shorter(clips.known)}
    given |= {name: of_newest(model, clips, frames) for name, frames in history.items()}
    variants = {
        name: of_one.measure(name, model, around=context_given(model, context, clips))
        for name, context in given.items()
    }
    cost = {name: of_one.loss_increase(variant) for name, variant in variants.items()}
    told = "; ".join(f"{name}: {percent(cost[name])}" for name in CHANGES)
    of_history = {frames: cost[name] for name, frames in history.items()}
    return Section(
        "context",
        "Is the context sufficient, and used?",
        f"What a wrong context costs, in loss (n = {len(clips)} clips): {told}. "
        f"{told_history(of_history, clips.known)}",
        f"The decoder of the frame after {clips.known} real ones gets another context: that of the "
        f"frame before, its own with the tokens in another order, that of another clip, zeros, or "
        f"what the encoder makes of only the newest of the {clips.known} frames. The loss is of "
        f"this frame alone, the same noise for all; frames in {bench.steps} steps. "
        f"eval.context_frames=… asks about longer histories.",
        {
            "context": figures.loss_increase(
                of_one.loss_percent([*variants.values()]),
                LEVELS,
                [*variants],
                f"Loss under another context, increase in % (n = {len(clips)})",
            )
        },
        of_one.table([*variants.values()]),
        {
            "variants": [of_one.numbers(v) for v in (of_one.untouched, *variants.values())],
            "history": of_history,
        },
    )


def change_count(known: int) -> int:
    return len(CHANGES) + len(shorter(known)) + 1  # and the right one


def shorter(known: int) -> list[int]:
    """1, 2, 4, … frames, fewer than those given."""
    return [2**power for power in range(known) if 2**power < known]


def told_history(costs: dict[int, tuple[float, float]], known: int) -> str:
    """How much past the context carries.

    Args:
        costs: frames that the encoder was given -> increase of the loss against all `known`.
    """
    told = ", ".join(f"{frames}: {percent(cost)}" for frames, cost in costs.items())
    enough = min((k for k, (mean, _) in costs.items() if mean <= TOLERANCE), default=None)
    verdict = (
        f"what lies before the newest {enough} gains less than {100 * TOLERANCE:.0f} %"
        if enough is not None
        else f"each of these loses more than {100 * TOLERANCE:.0f} %"
    )
    return f"With an encoder that sees only the newest of {known} frames: {told}; {verdict}."
