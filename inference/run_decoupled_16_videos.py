"""Generate sample videos from a checkpoint: an mp4 each, and a grid of all.

    python inference/run_decoupled_16_videos.py --opt options/scd_minecraft.yml \\
        --checkpoint CKPT --num-videos 16
"""

import argparse
import sys

from scd.cli import run_command
from scd.errors import ScdError
from scd.utils.paths import from_user, to_read


def main() -> int:
    """Parse the arguments, generate the videos, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--opt", help="options file (default: the options in the checkpoint)")
    parser.add_argument("--checkpoint", required=True, type=to_read)
    parser.add_argument("--num-videos", type=int, default=16)
    parser.add_argument("--output", type=from_user, help="(default: experiments/<name>/videos)")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    try:
        a = parser.parse_intermixed_args()
    except ScdError as error:
        parser.error(str(error))

    def sample() -> None:
        from scd.evaluation.pictures import sample_videos  # torch, once the process is ready

        sample_videos(a.checkpoint, a.opt, a.num_videos, a.output, a.overrides)

    return run_command(sample, "sample")


if __name__ == "__main__":
    sys.exit(main())
