"""What the fork server of tests/faults/runs.py imports once for all runs."""

import matplotlib.pyplot  # noqa: F401

import tests.faults.runs
import tests.train_on_processes  # noqa: F401
from scd import cli, pipeline  # noqa: F401
from scd.training import autoencoder_task, launch, world_model_task  # noqa: F401
from scd.utils.environment import git_commit

git_commit()  # kept
