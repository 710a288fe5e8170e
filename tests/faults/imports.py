"""What the fork server of tests/faults/runs.py imports once for all runs."""

import tests.faults.runs  # noqa: F401
from scd import cli, pipeline  # noqa: F401
from scd.training import autoencoder_task, launch, world_model_task  # noqa: F401
from scd.utils.environment import git_commit

git_commit()  # kept
