"""What all distillation needs: a teacher's velocities, and clean frames from velocities."""

from pathlib import Path

import torch
from torch import Tensor, nn

from scd.errors import ScdError, naming_option
from scd.flow.sampler import guide
from scd.models.autoencoder import Codec, encode_alike
from scd.models.load import LoadedModel, load_checkpoint_for_use
from scd.models.world_model import MAX_TIMESTEP, CausalWorldModel, FirstLook, WorldModel
from scd.options import Options

SAME = ("channels", "patch_size", "condition", "num_conditions")  # of teacher and student


def load_teacher(
    options: Options,
    student: WorldModel,
    codec: Codec,
    device: torch.device,
    option: str = "distill.teacher",
) -> LoadedModel:
    """Load the frozen teacher, which must fit the student and its latents.

    Args:
        option: that names it; `distill.weak_teacher` for the one to lead away from.

    Raises:
        ScdError: it is missing or damaged, of other latents or conditions, or of a kind that the
            method cannot use.
    """
    path = Path(teacher_path(options, option))
    with naming_option(option):
        loaded = load_checkpoint_for_use(path)
    teacher = loaded.model
    differences = [
        f"{name} is {teacher.config[name]} in the teacher, {student.config[name]} in the student"
        for name in SAME
        if teacher.config[name] != student.config[name]
    ]
    if differences:
        raise ScdError(f"{option}={path}: does not fit: {'; '.join(differences)}")
    if not encode_alike(loaded.codec, codec):
        raise ScdError(
            f"{option}={path}: its latents are not those of autoencoder.path="
            f"{options.autoencoder.path}"
        )
    generates_first = options.distill.method == "consistency" or not options.distill.context_frames
    if student.config.first_frame and generates_first and not teacher.config.first_frame:
        raise ScdError(
            f"{option}={path}: has model.first_frame=false, but the student learns frame 0"
        )
    if options.distill.method == "consistency" and not isinstance(teacher, CausalWorldModel):
        raise ScdError(
            f"{option}={path}: a {loaded.options.model.type}, but distill.method="
            f"consistency needs a causal model, scd or causal_dit"
        )
    if options.distill.method == "dmd" and teacher.takes_first_look:
        raise ScdError(
            f"{option}={path}: has model.encoder_frame={teacher.config.encoder_frame}, but "
            f"distill.method=dmd scores clips with a bidirectional_dit, a causal_dit, or an scd of "
            f"encoder_frame=shift"
        )
    judges = options.distill.adversarial_weight > 0 and option == "distill.teacher"
    if judges and teacher.has_context:
        raise ScdError(
            f"{option}={path}: an scd, but distill.adversarial_weight needs the features of "
            f"a bidirectional_dit or a causal_dit"
        )
    teacher.to(device).requires_grad_(False)
    return loaded


def teacher_path(options: Options, option: str) -> str:
    """Return the path of `distill.teacher` or `distill.weak_teacher`."""
    d = options.distill
    return str({"distill.teacher": d.teacher, "distill.weak_teacher": d.weak_teacher}[option])


class GuidedTeacher(nn.Module):
    """A teacher whose velocities v⁻ + w·(v⁺ − v⁻) lead away from a weaker answer v⁻.

    v⁻ is that of a weak model (autoguidance, arXiv 2406.02507), or, without one, the teacher's own
    under the null condition.

    Args:
        model: the teacher, v⁺.
        scale: w; with 1 there is no v⁻.
    """

    def __init__(self, model: WorldModel, scale: float = 1.0, weak: WorldModel | None = None):
        super().__init__()
        self.model = model
        self.scale = scale
        self.weak = weak

    @property
    def takes_first_look(self) -> bool:
        """Whether an encoder looks at the frames that are denoised."""
        return any(m is not None and m.takes_first_look for m in (self.model, self.weak))

    def forward(
        self,
        latents: Tensor,
        noisy: Tensor,
        timesteps: Tensor,
        conditions: Tensor | None,
        *,
        first_look: FirstLook | None = None,
        text: Tensor | None = None,
        null_text: Tensor | None = None,
    ) -> Tensor:
        """Predict velocities.

        Args and returns as `WorldModel.forward`, and
            first_look: for the models that take one.
            null_text: (1, T, text_dim), that of v⁻, with a text.
        """
        model, weak, scale = self.model, self.weak, self.scale
        inputs = latents, noisy, timesteps, conditions
        if scale == 1 or (weak is None and conditions is None and text is None):
            return _velocity(model, *inputs, first_look=first_look, text=text)
        if weak is not None:
            positive, negative = (
                _velocity(each, *inputs, first_look=first_look, text=text) for each in (model, weak)
            )
            return guide(positive, negative, scale)
        both = (torch.cat([x, x]) for x in (latents, noisy, timesteps))
        if conditions is not None:
            null = model.null_conditions(conditions.shape[:2]).type_as(conditions)
            conditions = torch.cat([conditions, null])
        if text is not None:
            assert null_text is not None
            text = torch.cat([text, null_text.expand_as(text)])
        if first_look is not None:
            first_look = FirstLook(*(torch.cat([x, x]) for x in first_look))
        velocity = _velocity(model, *both, conditions, first_look=first_look, text=text)
        positive, negative = velocity.chunk(2)
        return guide(positive, negative, scale)


def _velocity(
    model: WorldModel, *inputs: Tensor | None, first_look: FirstLook | None, text: Tensor | None
) -> Tensor:
    """Predict velocities, with the first look if the model takes one."""
    look = first_look if model.takes_first_look else None
    return model(*inputs, first_look=look, text=text)


def clean_frames(noisy: Tensor, velocity: Tensor, timesteps: Tensor) -> Tensor:
    """Compute x̂ = x − σ·v of frames (..., C, H, W) at timesteps (...)."""
    return noisy - (timesteps / MAX_TIMESTEP)[..., None, None, None] * velocity
