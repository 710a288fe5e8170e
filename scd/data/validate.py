"""`scd validate`: read a whole data set, count what it holds, check it against an experiment."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

from scd.data.clips import NEEDED
from scd.data.framing import framing_of
from scd.data.latents import LatentSpec
from scd.data.prompts import PromptFolder, read_lines
from scd.data.survey import Requirements, Survey, survey_list
from scd.data.video_checks import VideoChecks, slow_reading_note
from scd.errors import ScdError
from scd.options import Options
from scd.utils.files import write_json
from scd.utils.table import Table

FPS_SPREAD = 1.01  # a model cannot tell 29.97 from 30
SHOWN_KINDS = 12  # per line of the table; the JSON file has all


def validate_experiment(options: Options, latents: LatentSpec | None, report: Path | None) -> None:
    """Read both lists of an experiment; print a table, all broken clips and all warnings.

    Args:
        latents: what the training list must hold (`scd.training.encode.latent_spec`); None: videos.
        report: JSON file to write as well.

    Raises:
        ScdError: a list cannot be read, or a clip is broken (after everything was printed).
    """
    root = Path(options.data.root)
    if options.data.source == "prompts":
        return _validate_prompts(root, options, report)
    checks = VideoChecks(root)
    train = survey_list(checks, root / options.data.train_list, _for_training(options, latents))
    val = survey_list(checks, root / options.data.val_list, _for_evaluation(options, latents))
    names = dict(enumerate(options.data.action_names))
    _conclude(
        [train, val],
        _training_warnings(train, options) + _validation_warnings(train, val, options),
        checks,
        names,
        report,
    )


def _validate_prompts(root: Path, options: Options, report: Path | None) -> None:
    """Check that prompts to train on have embeddings."""
    path = root / options.data.train_list
    prompts = list(dict.fromkeys(read_lines(path)))
    PromptFolder(root).check([options.wan.negative_prompt, *prompts])
    print(f"{path}: {len(prompts)} prompts; {root} has the embeddings of all")
    if report is not None:
        lists = [{"path": str(path), "prompts": len(prompts)}]
        write_json(report, {"lists": lists, "warnings": []})


def validate_list(list_path: Path, root: Path, report: Path | None) -> None:
    """Read one list without an experiment, so every kind of clip is accepted.

    Raises:
        ScdError: see `validate_experiment`.
    """
    checks = VideoChecks(root)
    survey = survey_list(checks, list_path, Requirements())
    warnings = []
    if len(survey.sizes) > 1:
        warnings.append(
            f"{list_path}: frames of {len(survey.sizes)} sizes: set data.resize_shorter"
        )
    _conclude([survey], warnings + _repeats(survey), checks, {}, report)


def _for_evaluation(options: Options, latents: LatentSpec | None) -> Requirements:
    """Require videos, which evaluation compares with."""
    m, data = options.model, options.data
    return Requirements(
        fields=("video_path", *(("caption",) if m.is_wan else ()), *NEEDED[m.condition]),
        condition=m.condition,
        num_conditions=m.num_conditions,
        framing=framing_of(data),
        frames_per_latent=1 if latents is None else latents.frames_per_latent,
    )


def _for_training(options: Options, latents: LatentSpec | None) -> Requirements:
    required = _for_evaluation(options, latents)
    if latents is None:
        return required
    fields = ("latent_path", *required.fields[1:])
    return replace(required, fields=fields, framing=None, latents=latents)


def _training_warnings(survey: Survey, options: Options) -> list[str]:
    train = options.train
    batch = train.batch_size * train.gradient_accumulation
    warnings = _repeats(survey)
    if survey.clips < batch:
        warnings.append(
            f"{survey.path}: {survey.clips} clip{'s' * (survey.clips > 1)} for batches of {batch} "
            f"(train.batch_size): "
            f"suspiciously few"
        )
    if options.model.is_wan:
        warnings += _other_rates(survey, options.data.fps)
    return warnings + _short_of_training(survey, options)


def _other_rates(survey: Survey, fps: float) -> list[str]:
    """Warn of videos whose frame rate is not the one that a pretrained model's motion has."""
    others = sum(not 1 / FPS_SPREAD < rate / fps < FPS_SPREAD for rate in survey.fps)
    if not others:
        return []
    return [
        f"{survey.path}: {others} of {survey.clips} videos have another frame rate than data.fps="
        f"{fps:g}, at which the model's videos play: their motion is learned too fast or too slow; "
        f"convert them first (ffmpeg -i IN.mp4 -r {fps:g} OUT.mp4)"
    ]


def _validation_warnings(train: Survey, survey: Survey, options: Options) -> list[str]:
    o = options.eval
    warnings = _repeats(survey)
    if survey.clips < o.videos and not options.model.is_wan:  # which is evaluated on prompts
        warnings.append(
            f"{survey.path}: {survey.clips} clip{'s' * (survey.clips > 1)} for "
            f"eval.videos={o.videos}: some are evaluated more than once, each time from another "
            f"first frame"
        )
    both = len(set(train.videos) & set(survey.videos))
    if both:
        warnings.append(
            f"{survey.path}: {both} clips are in the training list as well (same content): "
            f"metrics on them say nothing about new videos"
        )
    if options.model.is_wan:  # the loss is that of training clips
        warnings += _short_of_training(survey, options)
    elif options.task == "world_model":
        span = (o.context_frames + o.new_frames - 1) * options.data.frame_stride + 1
        warnings += _short(survey, survey.lengths, span, "eval.context_frames + eval.new_frames")
    return warnings


def _repeats(survey: Survey) -> list[str]:
    twice = len(survey.digests) - len(set(survey.digests))
    return [f"{survey.path}: {twice} clips are repeated"] if twice else []


def _short_of_training(survey: Survey, options: Options) -> list[str]:
    span = (options.data.frames - 1) * options.data.frame_stride + 1
    return _short(survey, survey.latent_lengths or survey.lengths, span, "data.frames")


def _short(survey: Survey, lengths: list[int], span: int, keys: str) -> list[str]:
    short = sum(length < span for length in lengths)
    if not short:
        return []
    return [
        f"{survey.path}: {short} of {survey.clips} clips are shorter than the {span} frames of "
        f"{keys}: reading them will fail"
    ]


def _video_warnings(survey: Survey, root: Path) -> list[str]:
    """Warn of videos that are slow to read, and of unequal frame rates."""
    slow = survey.in_order
    warnings = [slow_reading_note(Path(survey.path), root, slow)] if slow else []
    slowest, fastest = min(survey.fps, default=1.0), max(survey.fps, default=1.0)
    if fastest > FPS_SPREAD * slowest:
        warnings.append(
            f"{survey.path}: {slowest:g} to {fastest:g} frames per second: the time between two "
            f"frames differs from clip to clip"
        )
    return warnings


def _save(checks: VideoChecks) -> list[str]:
    """Save the checks of the videos, and warn if that fails."""
    try:
        checks.save()
    except ScdError as error:
        return [f"{error}: every command will check its videos again"]
    return []


def _conclude(
    surveys: list[Survey],
    warnings: list[str],
    checks: VideoChecks,
    names: dict[int, str],
    report: Path | None,
) -> None:
    broken = [line for survey in surveys for line in survey.broken]
    video_warnings = [line for survey in surveys for line in _video_warnings(survey, checks.root)]
    warnings = warnings + video_warnings + _save(checks)
    print(table(surveys, names).markdown())
    for line in broken:
        print(f"broken: {line}")
    for line in warnings:
        print(f"warning: {line}")
    if report is not None:
        lists = [survey.as_dict() for survey in surveys]
        write_json(report, {"lists": lists, "warnings": warnings})
    if broken:
        clips = sum(survey.clips for survey in surveys)
        raise ScdError(f"broken clips: {len(broken)} of {clips}, named above")


def table(surveys: list[Survey], action_names: dict[int, str]) -> Table:
    """Make a table with one column for each list."""
    heads = ["", *(Path(survey.path).name for survey in surveys)]
    lines = [
        ["clips", *(str(s.clips) for s in surveys)],
        ["broken", *(str(len(s.broken)) for s in surveys)],
        ["frames", *(str(sum(s.lengths)) for s in surveys)],
        [
            "frames per clip: min / median / max",
            *(" / ".join(map(str, s.length_range)) for s in surveys),
        ],
        ["clips by frame size (height x width)", *(_kinds(s.sizes) for s in surveys)],
        ["frames per second", *(_kinds(Counter(f"{fps:.4g}" for fps in s.fps)) for s in surveys)],
        ["videos read in order", *(str(len(s.in_order) or "") for s in surveys)],
        ["actions, share of frames", *(_shares(s.actions, action_names) for s in surveys)],
        ["held together, share of frames", *(_held(s.held, action_names) for s in surveys)],
        ["classes", *(_classes(s.labels) for s in surveys)],
        ["latents", *(_kinds(s.latents) for s in surveys)],
        ["content hash", *(s.content_hash[:16] for s in surveys)],
    ]
    shown = [[head, *(cell or "–" for cell in cells)] for head, *cells in lines if any(cells)]
    return Table(heads, shown, len(heads), [])


def _kinds(counts: Counter[str]) -> str:
    parts = [f"{kind}: {count}" for kind, count in counts.most_common(SHOWN_KINDS)]
    return ", ".join(parts) + (", …" if len(counts) > SHOWN_KINDS else "")


def _shares(counts: Counter[int], names: dict[int, str]) -> str:
    total = sum(counts.values())
    parts = [f"{names.get(key, key)} {counts[key] / total:.1%}" for key in sorted(counts)]
    return ", ".join(parts[:SHOWN_KINDS]) + (", …" if len(parts) > SHOWN_KINDS else "")


def _held(counts: Counter[tuple[int, ...]], names: dict[int, str]) -> str:
    total = counts.total()
    parts = [
        f"{' + '.join(names.get(key, str(key)) for key in held) or 'nothing'} {count / total:.1%}"
        for held, count in counts.most_common(SHOWN_KINDS)
    ]
    return ", ".join(parts) + (", …" if len(counts) > SHOWN_KINDS else "")


def _classes(counts: Counter[int]) -> str:
    if not counts:
        return ""
    return f"{len(counts)}, of {min(counts.values())} to {max(counts.values())} clips"
