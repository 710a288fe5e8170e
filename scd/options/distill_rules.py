"""Which options of `distill` a model can be trained with; see `rules.py`.

They do not bind its use: a student can be sampled with any solver, guidance or window.
"""

from scd.options.schema import Options
from scd.options.wan_rules import Rule

DISTILLATION: list[Rule] = [
    (
        lambda o: (o.distill.method == "none") == (o.distill.teacher is None),
        "distill.teacher={distill.teacher} with distill.method={distill.method}: set both, or "
        "neither",
    ),
    (
        lambda o: o.distill.weak_teacher is None or o.distill.guidance_scale != 1,
        "distill.weak_teacher={distill.weak_teacher} with distill.guidance_scale=1: nothing leads "
        "away from it; begin with 1.25",
    ),
    (
        lambda o: o.distill.weak_teacher is None or o.distill.teacher is not None,
        "distill.weak_teacher={distill.weak_teacher} without distill.teacher",
    ),
    (
        lambda o: (
            o.distill.guidance_scale == 1
            or o.distill.weak_teacher is not None
            or o.model.condition != "none"
            or o.model.is_wan
        ),
        "distill.guidance_scale={distill.guidance_scale} leads away from nothing: it needs "
        "distill.weak_teacher, or a model with a condition",
    ),
    (
        lambda o: o.distill.method == "none" or o.init_from is not None,
        "distill.method={distill.method} needs init_from, the student's first weights",
    ),
    (
        lambda o: o.distill.method == "none" or not o.model.is_bidirectional,
        "distill.method={distill.method}: the student must be causal, not model.type={model.type}",
    ),
    (
        lambda o: o.distill.method == "none" or o.rollout.solver == "consistency",
        "distill.method={distill.method} with rollout.solver={rollout.solver}: such a student is "
        "sampled with rollout.solver=consistency",
    ),
    (
        lambda o: (
            o.distill.method == "none"
            or (o.flow.encoder_input, o.flow.history_noise_max) == ("clean", 0)
        ),
        "distill.method={distill.method}: flow.encoder_input and flow.history_noise_max are of "
        "teacher forcing alone",
    ),
    (
        lambda o: o.distill.method != "dmd" or o.flow.self_forcing_prob == 0,
        "distill.method=dmd with flow.self_forcing_prob={flow.self_forcing_prob}: it "
        "learns from rollouts already (distill.self_rollout)",
    ),
    (
        lambda o: o.distill.method != "dmd" or o.distill.context_frames < o.data.frames,
        "distill.context_frames={distill.context_frames} leaves none of data.frames={data.frames} "
        "to generate",
    ),
    (
        lambda o: (
            o.distill.window_frames is None
            or 0 < o.distill.context_frames < o.distill.window_frames <= o.data.frames
        ),
        "distill.window_frames={distill.window_frames} must be more than "
        "distill.context_frames={distill.context_frames}, of which there must be one at least, and "
        "at most data.frames={data.frames}",
    ),
    (
        lambda o: (
            o.distill.window_frames is None
            or (o.distill.method, o.distill.self_rollout, o.distill.adversarial_weight)
            == ("dmd", True, 0)
        ),
        "distill.window_frames={distill.window_frames} is of distill.method=dmd on own rollouts "
        "(distill.self_rollout), without distill.adversarial_weight: real frames do not follow own "
        "ones",
    ),
    (
        lambda o: o.distill.window_frames is None or not o.model.is_wan,
        "distill.window_frames={distill.window_frames} with model.type={model.type}: a clip of a "
        "Wan begins with a latent of a single picture, and a window of later ones would not",
    ),
    (
        lambda o: o.distill.window_frames is None or o.rollout.first_frame_steps == 0,
        "distill.window_frames={distill.window_frames} with rollout.first_frame_steps="
        "{rollout.first_frame_steps}: the first frame of a window is not the first of a video",
    ),
    (
        lambda o: o.distill.self_rollout or o.rollout.first_frame_steps == 0,
        "distill.self_rollout=false with rollout.first_frame_steps={rollout.first_frame_steps}: "
        "without rollouts every frame is generated after real ones, and none is the first",
    ),
    (
        lambda o: o.distill.adversarial_weight == 0 or o.distill.method == "dmd",
        "distill.adversarial_weight={distill.adversarial_weight} is of distill.method=dmd, not "
        "{distill.method}",
    ),
    (
        lambda o: o.distill.method != "dmd" or not o.rollout.compile,
        "rollout.compile with distill.method=dmd: its rollouts leave the denoising after any step, "
        "and a graph has no such exit; set rollout.compile=false for the training",
    ),
    (
        lambda o: o.distill.method != "dmd" or o.distill.context_frames > 0 or o.model.first_frame,
        "distill.context_frames=0 needs model.first_frame=true: frame 0 must have been learned",
    ),
    (
        lambda o: (
            o.distill.method != "dmd"
            or not 0 < o.rollout.window < (o.distill.window_frames or o.data.frames) - 1
        ),
        "rollout.window={rollout.window} with distill.method=dmd: a frame of a rollout then sees "
        "fewer past frames than distill.window_frames={distill.window_frames} (null: "
        "data.frames={data.frames}) has, all of which its replay sees",
    ),
    (
        lambda o: o.distill.method != "dmd" or any(_student_weights(o)),
        "distill.matching_weight and distill.adversarial_weight are both 0: the student would "
        "learn nothing",
    ),
    (
        lambda o: o.distill.method != "dmd" or o.rollout.guidance_scale == 1,
        "rollout.guidance_scale={rollout.guidance_scale} with distill.method=dmd: the student is "
        "trained as it is sampled, without guidance",
    ),
]


def _student_weights(o: Options) -> tuple[float, float]:
    return o.distill.matching_weight, o.distill.adversarial_weight
