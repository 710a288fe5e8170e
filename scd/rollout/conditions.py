"""The conditions of a rollout's frames, and the modulation that follows from them alone."""

import torch
from torch import Tensor

from scd.models.world_model import CausalWorldModel, PrecomputedModulation


class RolloutConditions:
    """Actions and labels of a rollout as ids, and the modulation that follows from them alone.

    Where an action or a class is one of several, the modulation is computed once, for all of them,
    and frames keep their ids. Vectors cannot be enumerated: frames keep the vectors, and their
    modulation is computed with each frame, by a few small matrix products.

    The values of actions are checked where they are on the CPU. Reading them from a GPU would wait
    for it, in a training rollout once a frame, and there the data set has checked them.

    Args:
        labels: (B,), of the whole rollout.
        timesteps: (T,), of the denoising steps.
        with_null: every batch is followed by a second one, of the null condition.

    Raises:
        ScdError: labels that the model does not have.
    """

    def __init__(
        self,
        model: CausalWorldModel,
        batch: int,
        labels: Tensor | None,
        timesteps: Tensor,
        with_null: bool,
    ):
        if labels is not None:
            model.frame_conditions((batch, 1), None, labels)
            model.check_conditions(labels)
            labels = labels.long().to(model.device)
        self._model = model
        self._batch = batch
        self._labels = labels
        self._timesteps = timesteps
        self._with_null = with_null
        self._modulation: PrecomputedModulation | None = None
        if model.has_vectors:
            self._null = model.null_conditions((1, 1))[0, 0]
            return
        null = model.null_condition
        if labels is None:
            known = torch.arange(null + 1, device=model.device)
        else:  # of many classes, only those of this batch
            known = torch.cat([labels, labels.new_tensor([null])]).unique()
        self._ids = torch.zeros(null + 1, dtype=torch.long, device=model.device)
        self._ids[known] = torch.arange(len(known), device=model.device)
        self._null = self._ids[null]
        self._modulation = model.precompute_modulation(known, timesteps)

    def frame_conditions(self, actions: Tensor | None, frames: int) -> Tensor:
        """Turn the actions (B, F) or (B, F, V) of F frames into what is kept of them.

        Returns:
            (B, F) ids, or (B, F, V + 1) vectors.

        Raises:
            ScdError: actions of another shape, or, on the CPU, that the model does not have.
        """
        model, shape = self._model, (self._batch, frames)
        conditions = model.frame_conditions(shape, actions, self._labels)
        if conditions is None:
            conditions = torch.zeros(shape, dtype=torch.long, device=model.device)
        if actions is not None:
            if conditions.device.type == "cpu":
                model.check_conditions(conditions)
            conditions = conditions.to(model.device)
        return conditions if self._modulation is None else self._ids[conditions]

    def modulation(
        self, conditions: Tensor, next_conditions: Tensor, denoised: bool
    ) -> tuple[Tensor, Tensor, PrecomputedModulation]:
        """Look up or compute the modulation of frames and of those after them.

        Args:
            conditions, next_conditions: from `frame_conditions`.
            denoised: a frame is to be denoised, not only encoded.

        Returns:
            Ids (B, F) of `conditions` and of `next_conditions`, and the modulation of these ids,
            as `prefill` and `begin_frame` of a model take them.
        """
        if self._with_null:
            conditions, next_conditions = (
                torch.cat([given, self._null.expand(given.shape)])
                for given in (conditions, next_conditions)
            )
        if self._modulation is not None:
            return conditions, next_conditions, self._modulation
        rows = torch.cat([conditions.flatten(0, 1), next_conditions.flatten(0, 1)])
        timesteps = self._timesteps if denoised else self._timesteps[:0]
        modulation = self._model.precompute_modulation(rows, timesteps)
        shape, next_shape = conditions.shape[:2], next_conditions.shape[:2]
        ids, next_ids = torch.arange(len(rows), device=rows.device).tensor_split([shape.numel()])
        return ids.view(shape), next_ids.view(next_shape), modulation
