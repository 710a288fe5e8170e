"""What the frames of a rollout are conditioned on, and what follows from that alone."""

from typing import Any

import torch
from torch import Tensor

from scd.models.world_model import WorldModel


class RolloutConditions:
    """Actions and labels as the rollout's model takes them: by number (`WorldModel.conditioned`).

    What follows from an action or a class that is one of several is computed once, for all of them;
    frames keep their numbers. Of vectors there are too many: frames keep the vectors, and what
    follows from theirs is computed with each frame, a few small matrix products.

    Args:
        labels: (B,), of the whole rollout.
        timesteps: (T,), of the denoising steps.
        with_null: every batch is followed by a second one, of the null condition.

    Raises:
        ScdError: labels that the model does not have.
    """

    def __init__(
        self,
        model: WorldModel,
        batch: int,
        labels: Tensor | None,
        timesteps: Tensor,
        with_null: bool,
    ):
        if labels is not None:
            model.frame_conditions((batch, 1), None, labels)
            model.check_conditions(labels)
            labels = labels.to(model.device)
        self._model = model
        self._batch = batch
        self._labels = labels
        self._timesteps = timesteps
        self._with_null = with_null
        self._known: Any = None
        if model.has_vectors:
            self._null = model.null_conditions((1, 1))[0, 0]
            return
        null = model.null_condition
        if labels is None:
            known = torch.arange(null + 1, device=model.device)
        else:  # of many classes, only those of this batch
            known = torch.cat([labels, labels.new_tensor([null])]).unique()
        self._number_of = torch.zeros(null + 1, dtype=torch.long, device=model.device)
        self._number_of[known] = torch.arange(len(known), device=model.device)
        self._null = self._number_of[null]
        self._known = model.conditioned(known, timesteps)

    def of_frames(self, actions: Tensor | None, frames: int) -> Tensor:
        """What so many frames under these actions, (B, F) or (B, F, V), keep.

        Raises:
            ScdError: actions that the model does not have, or of another shape.
        """
        model, shape = self._model, (self._batch, frames)
        conditions = model.frame_conditions(shape, actions, self._labels)
        if conditions is None:
            conditions = torch.zeros(shape, dtype=torch.long, device=model.device)
        if actions is not None:
            # Before they are used, on the device they came on: on the CPU that costs no sync.
            model.check_conditions(conditions)
            conditions = conditions.to(model.device)
        return conditions if self._known is None else self._number_of[conditions]

    def numbered(
        self, own: Tensor, following: Tensor, denoised: bool
    ) -> tuple[Tensor, Tensor, Any]:
        """What `take_in` and `next_frame` of a model want of frames and those after them.

        Args:
            own, following: see `of_frames`.
            denoised: a frame is to be denoised, not only taken in.

        Returns:
            Numbers (B, F) of `own` and of `following`, and what `WorldModel.conditioned` made of
            the conditions that they stand for.
        """
        if self._with_null:
            own, following = (
                torch.cat([conditions, self._null.expand(conditions.shape)])
                for conditions in (own, following)
            )
        if self._known is not None:
            return own, following, self._known
        rows = torch.cat([own.flatten(0, 1), following.flatten(0, 1)])
        timesteps = self._timesteps if denoised else self._timesteps[:0]
        conditioned = self._model.conditioned(rows, timesteps)
        numbers = torch.arange(len(rows), device=rows.device)
        of_own, of_following = numbers.tensor_split([own.shape[:2].numel()])
        return of_own.view(own.shape[:2]), of_following.view(following.shape[:2]), conditioned
