"""The metrics of generated videos: each is one entry of `METRICS`, which all of evaluation reads.

Four kinds: a frame metric compares each new frame with the real one, a clip statistic is a number
of a clip alone that is held against that of the real clips, a trajectory metric compares the
predictions of a clip under two seeds, and a set metric is a distance between the features of two
sets of clips. What becomes of each kind is in `scd.evaluation.measure` (what is stored of a clip)
and `scd.evaluation.summary` (what is reported of a row).
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from scd.evaluation.frame_metrics import (
    SMALLEST_LPIPS,
    SMALLEST_SHARPNESS,
    SMALLEST_SSIM,
    lpips_distance,
    motion,
    psnr,
    sharpness,
    ssim,
)
from scd.evaluation.fvd import frechet_distance, kernel_distance
from scd.evaluation.i3d import SHORTEST, i3d_features
from scd.evaluation.metric_weights import MetricUnavailable, weights_hash


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A metric's name, direction and needs.

    Attributes:
        title: name in the head of a table's column.
        better: `↑`, `↓`, or `→1`: the value of the real clips themselves is best.
        unit: shown behind the title in probe reports; say it in the title where it is not common.
        smallest: pixels, the least height and width of a frame.
        fewest_frames: the least number of new frames; for a set metric, of frames of a clip.
        fewest_videos: the least number of videos.
        weights: name in `metric_weights.SOURCES`.
    """

    title: str
    better: str
    decimals: int
    unit: str = ""
    smallest: int = 1
    fewest_frames: int = 1
    fewest_videos: int = 1
    weights: str | None = None

    @property
    def head(self) -> str:
        return f"{self.title} {self.better}"

    def format(self, value: float | None) -> str:
        """Write a value, or a dash for none."""
        return "–" if value is None else f"{value:.{self.decimals}f}"


@dataclass(frozen=True, kw_only=True)
class FrameMetric(Metric):
    """A comparison of new frames with the real ones.

    Attributes:
        function: videos and real videos, (n, F, 3, H, W) in [0, 1] each -> (n, F).
        first_frames: give the mean over the first four new frames a column of its own; it stands in
            `metrics.json` either way.
    """

    function: Callable[[Tensor, Tensor], Tensor]
    first_frames: bool = False


@dataclass(frozen=True, kw_only=True)
class ClipStatistic(Metric):
    """A number of each frame, or pair of frames, of a clip alone.

    Reported as its mean over the generated clips divided by its mean over the real ones.

    Attributes:
        function: videos (n, F, 3, H, W) in [0, 1] -> (n, F'), not negative.
    """

    function: Callable[[Tensor], Tensor]
    better: str = "→1"


@dataclass(frozen=True, kw_only=True)
class TrajectoryMetric(Metric):
    """A comparison of the new frames of a clip under two seeds.

    Reported as its mean over the clips, and over the pairs of neighbours among the seeds.

    Attributes:
        function: videos and other videos, (n, F, 3, H, W) in [0, 1] each -> (n, F).
    """

    function: Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class SetMetric(Metric):
    """A distance between two sets of clips.

    Attributes:
        features: name in `EXTRACTORS`; metrics of the same features share their computation.
        function: features of real and of other clips, (n, D) each -> distance.
    """

    features: str
    function: Callable[[Tensor, Tensor], float]
    better: str = "↓"


EXTRACTORS: dict[str, Callable[..., Tensor]] = {  # videos, precision -> (n, D)
    "i3d": i3d_features,
}

METRICS: dict[str, Metric] = {
    "psnr": FrameMetric(
        title="PSNR", better="↑", decimals=2, unit="dB", function=psnr, first_frames=True
    ),
    "ssim": FrameMetric(
        title="SSIM", better="↑", decimals=3, smallest=SMALLEST_SSIM, function=ssim
    ),
    "lpips": FrameMetric(
        title="LPIPS",
        better="↓",
        decimals=3,
        smallest=SMALLEST_LPIPS,
        weights="lpips",
        function=lpips_distance,
        first_frames=True,
    ),
    "fvd": SetMetric(
        title="FVD",
        decimals=1,
        fewest_frames=SHORTEST,
        fewest_videos=2,
        weights="i3d",
        features="i3d",
        function=frechet_distance,
    ),
    "kvd": SetMetric(
        title="KVD",
        decimals=2,
        fewest_frames=SHORTEST,
        fewest_videos=2,
        weights="i3d",
        features="i3d",
        function=kernel_distance,
    ),
    "sharpness": ClipStatistic(
        title="sharpness", decimals=2, smallest=SMALLEST_SHARPNESS, function=sharpness
    ),
    "motion": ClipStatistic(title="motion", decimals=2, fewest_frames=2, function=motion),
    "diversity": TrajectoryMetric(
        title="diversity",
        better="↑",
        decimals=3,
        smallest=SMALLEST_LPIPS,
        weights="lpips",
        function=lpips_distance,
    ),
}


@dataclass(frozen=True)
class Setting:
    """The sizes of an evaluation, which decide what can be measured."""

    videos: int
    context_frames: int
    new_frames: int
    frame_size: int
    windows: int = 0  # of the new frames, each with set metrics of its own
    trajectories: int = 1  # predictions of a clip, under different seeds

    @property
    def window_frames(self) -> int:
        """Frames in a window; a remainder of the new frames lies between the windows."""
        return self.new_frames // self.windows

    def window_slices(self) -> list[slice]:
        """Cut the new frames of a clip into windows of equal length, spread over all of them."""
        starts = [
            self.context_frames + number * self.new_frames // self.windows
            for number in range(self.windows)
        ]
        return [slice(start, start + self.window_frames) for start in starts]


class AvailableMetrics:
    """The metrics that can be computed here, and the reasons why others cannot.

    Attributes:
        metrics: those that can be computed.
        missing: metric -> reason. Set metrics by window have the name `<metric>_by_window`.
        hashes: weights -> SHA-256 of the file.

    Args:
        setting: None: only missing weights are a reason.
    """

    def __init__(self, setting: Setting | None = None) -> None:
        self.metrics: dict[str, Metric] = {}
        self.missing: dict[str, str] = {}
        self.hashes: dict[str, str] = {}
        for key, metric in METRICS.items():
            try:
                reason = None if setting is None else _reason(metric, setting)
                if reason is None and metric.weights is not None:
                    self.hashes[metric.weights] = weights_hash(metric.weights)
            except MetricUnavailable as error:
                reason = str(error)
            if reason is not None:
                self.missing[key] = reason
                continue
            self.metrics[key] = metric
            short = None if setting is None else _window_reason(metric, setting)
            if short is not None:
                self.missing[by_window(key)] = short

    def compare_frames(self, videos: Tensor, real: Tensor) -> dict[str, Tensor]:
        """Compute all frame metrics of videos (n, F, 3, H, W) in [0, 1].

        Returns:
            Metric -> (n, F), on the CPU.
        """
        return {
            key: metric.function(videos, real).cpu()
            for key, metric in self.metrics.items()
            if isinstance(metric, FrameMetric)
        }


def by_window(name: str) -> str:
    """Name a set metric's values over windows of the new frames."""
    return f"{name}_by_window"


def _reason(metric: Metric, setting: Setting) -> str | None:
    """Say why a metric cannot be computed at these sizes, if so."""
    if isinstance(metric, FrameMetric) and not setting.context_frames:
        return "videos made from nothing have no real counterpart"
    if isinstance(metric, TrajectoryMetric) and setting.trajectories < 2:
        return f"{metric.title} needs two different seeds: eval.trajectories=2 or more"
    if setting.frame_size < metric.smallest:
        return f"{metric.title} needs frames of {metric.smallest} pixels a side or more"
    if isinstance(metric, SetMetric):
        frames, what = setting.context_frames + setting.new_frames, "clips of {} frames"
    else:
        frames, what = setting.new_frames, "{} new frames"
    if frames < metric.fewest_frames:
        return f"{metric.title} needs {what.format(metric.fewest_frames)} or more"
    if setting.videos < metric.fewest_videos:
        return f"{metric.title} needs {metric.fewest_videos} videos or more"
    return None


def _window_reason(metric: Metric, setting: Setting) -> str | None:
    """Say why a set metric cannot be computed in windows of the new frames, if so."""
    if not (setting.windows and isinstance(metric, SetMetric)):
        return None
    if setting.window_frames >= metric.fewest_frames:
        return None
    return (
        f"{metric.title} needs windows of {metric.fewest_frames} frames or more, these have "
        f"{setting.window_frames}: lower eval.windows"
    )
