"""The probe of SCD's context: what the decoder loses when its context is not the right one."""

from scd.analysis import figures
from scd.analysis.bench import Bench
from scd.analysis.context import CHANGES, context_given, contexts
from scd.analysis.quality import LEVELS
from scd.analysis.report import Section
from scd.models import SCD


def change_context(bench: Bench) -> Section:
    """Swap, zero, shuffle and delay the context of the first new frame."""
    model, clips = bench.model, bench.clips.cut(1)
    assert isinstance(model, SCD)
    of_one = Bench(bench.loaded, clips, bench.steps, 0, bench.bar)
    right = contexts(model, clips)
    variants = [
        of_one.measure(name, model, around=context_given(model, change(right), clips))
        for name, change in CHANGES.items()
    ]
    told = ", ".join(f"{v.name}: {100 * of_one.loss_increase(v):+.0f} %" for v in variants)
    return Section(
        "context",
        "Is the context sufficient, and used?",
        f"What a wrong context costs, in loss: {told}.",
        f"The decoder of the frame after {clips.known} real ones gets another context: that of the "
        f"frame before, its own with the tokens in another order, that of another clip, or zeros. "
        f"n = {len(clips)} clips, the same noise; frames in {bench.steps} steps.",
        {
            "context": figures.loss_increase(
                of_one.loss_percent(variants),
                LEVELS,
                [variant.name for variant in variants],
                f"Loss under a wrong context, increase in % (n = {len(clips)})",
            )
        },
        of_one.table(variants),
        {"variants": [of_one.numbers(variant) for variant in (of_one.untouched, *variants)]},
    )


def change_count() -> int:
    return len(CHANGES) + 1  # and the right one
