"""A tiny random Wan through its training by the commands: encode, teacher forcing, and after."""

import json
import re
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import AutoencoderKLWan
from safetensors.torch import save_file

from scd.cli import main
from scd.data.prompts import EMBEDDINGS, PromptFolder, write_embedding, write_prompt_list
from scd.data.video import write_video
from scd.errors import ScdError
from scd.models.weights import read_all_weights
from scd.options import RolloutOptions, load_options, options_to_dict
from scd.rollout import Rollout
from scd.training.launch import run_experiment
from scd.training.run_log import read_log
from scd.training.step_cost import estimate_by_depth, estimate_step, frame_flops
from scd.training.wan_dry_run import count_parameters
from scd.wan import BidirectionalWan, CausalWan, SCDWan
from scd.wan.captioned import CaptionedLatents
from scd.wan.from_options import build_wan, options_in, start_wan, teacher_wan
from scd.wan.sampling import load_pipeline
from scd.wan.training_run import TRAINING_FILE
from scd.wan.video_codec import WanCodec
from tests.test_processes import assert_close, on_two, state_of
from tests.test_wan import TEXT, disturbed, tiny_wan

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.usefixtures("fresh_accelerate", "one_thread")
STAGES = ("forced", "consistent", "distilled")
CAPTIONS = ["a red square", "a cat &amp; a dog", "rain"]
SIZES = ["--encoder-layers", "2", "--decoder-first", "1", "--decoder-last", "1"]
HEIGHT, WIDTH, PICTURES = 32, 48, 9


@pytest.fixture(scope="session")
def wan_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Wan, `own`, and what `scd wan convert` makes of it: `scd`, `causal`, and `wan`."""
    folder = tmp_path_factory.mktemp("wan")
    tiny_wan(num_layers=3).save_pretrained(folder / "own/transformer")
    torch.manual_seed(0)
    small = {"dim_mult": [1, 1, 1, 1], "num_res_blocks": 1, "z_dim": 16}
    vae = AutoencoderKLWan(base_dim=4, **small, temperal_downsample=[False, True, True])
    disturbed(vae).save_pretrained(folder / "own/vae")
    command = ["wan", "convert", str(folder / "own"), "--out"]
    assert main([*command, str(folder / "scd"), *SIZES]) == 0
    assert main([*command, str(folder / "keys"), *SIZES, "--num-actions", "3"]) == 0
    assert main([*command, str(folder / "causal"), "--type", "causal"]) == 0
    itself = ["--type", "bidirectional"]
    assert main([*command, str(folder / "wan"), *itself]) == 0
    assert main([*command, str(folder / "wan_keys"), *itself, "--num-actions", "3"]) == 0
    return folder


@pytest.fixture
def data_root(tmp_path: Path) -> Path:
    """Videos with captions and actions, prompts, and random embeddings of both."""
    root, rng = tmp_path / "data", np.random.default_rng(0)
    generator = torch.Generator().manual_seed(1)
    entries = []
    for number, caption in enumerate(CAPTIONS):
        frames = rng.integers(256, size=(PICTURES + number, HEIGHT, WIDTH, 3), dtype=np.uint8)
        write_video(root / f"{number}.mp4", frames, fps=16)
        np.savez(root / f"{number}.npz", actions=rng.integers(3, size=PICTURES + number))
        files = {"video_path": f"{number}.mp4", "action_path": f"{number}.npz"}
        entries.append({**files, "caption": caption})
    for name in ("train.json", "val.json"):
        (root / name).write_text(json.dumps(entries))
    (root / "prompts.txt").write_text("\n".join(CAPTIONS) + "\n")
    prompts = write_prompt_list(root, "noise", 5, "", {p: p for p in ["", *CAPTIONS]})
    for number, file in enumerate(prompts.files.values()):
        rows = torch.randn(number + 1, TEXT, generator=generator)
        write_embedding(root / EMBEDDINGS / file, rows)
    return root


@pytest.fixture
def overrides(wan_folder: Path, data_root: Path, tmp_path: Path) -> list[str]:
    """What turns an options file of Wan's true size into a tiny one."""
    return [
        *(f"data.root={data_root}", f"output_root={tmp_path}/runs", "train.mixed_precision=fp32"),
        *(f"data.frame_size={HEIGHT}", f"data.frame_width={WIDTH}", "data.resize_shorter=null"),
        *("data.frames=3", "model.heads=2", "wan.head_dim=12", "wan.ffn_dim=32"),
        *(f"wan.text_dim={TEXT}", "wan.text_length=5", f"autoencoder.path={wan_folder}/own/vae"),
        *("train.batch_size=2", "train.gradient_accumulation=1", "train.workers=0"),
        *(
            "train.log_every=1",
            "eval.new_frames=2",
            "eval.videos=2",
            "rollout.steps=2",
            "rollout.precision=fp32",
            "optim.warmup_steps=0",
        ),
    ]


def train(file: str, *overrides: str) -> list[dict]:
    assert main(["train", "--opt", f"options/{file}.yml", *overrides]) == 0
    given = dict(text.split("=", 1) for text in overrides)
    return read_log(Path(given["output_root"]) / given["name"] / "log.jsonl")


SCD = ["model.encoder_layers=2", "model.decoder_layers=2", "wan.decoder_first=1"]


@pytest.mark.slow
def test_teacher_forcing_from_videos_with_captions(
    wan_folder, data_root, overrides, tmp_path, capsys
):
    start = [*overrides, *SCD, f"init_from={wan_folder}/scd", "optim.lr=1e-3"]
    assert main(["encode", "--opt", "options/scd_wan.yml", *start]) == 0
    assert main(["encode", "--opt", "options/scd_wan.yml", *start, "data.train_list=val.json"]) == 0
    capsys.readouterr()
    for frames, short in ((3, 0), (4, 2)):  # latent ones, each but the first of four pictures
        wanted = [*start, f"data.frames={frames}"]
        assert main(["validate", "--opt", "options/scd_wan.yml", *wanted]) == 0
        told = capsys.readouterr().out
        assert told.count("are shorter than the 4 frames of data.frames") == short
        assert "more than once" not in told and "frame rate" not in told
    listed = ["validate", "--list", str(data_root / "train.json")]
    assert main([*listed, "--root", str(data_root)]) == 0
    assert main(["validate", "--opt", "options/scd_wan.yml", *start, "data.fps=24"]) == 0
    assert "3 of 3 videos have another frame rate than data.fps=24" in capsys.readouterr().out
    often = ["train.steps=3", "train.sample_every=3", "train.val_loss_every=3"]
    log = train("scd_wan", *start, "name=forced", *often)
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert len(losses) == 3 and all(0 < loss < 100 for loss in losses)
    assert [entry["val_loss"] > 0 for entry in log if "val_loss" in entry] == [True]
    samples = tmp_path / "runs/forced/samples/step-00000003"
    assert sorted(path.name for path in samples.glob("*.mp4")) == ["00.mp4", "01.mp4"]
    exported = tmp_path / "runs/forced/exported"
    before, after = (read_all_weights(folder) for folder in (wan_folder / "scd", exported))
    assert before.keys() == after.keys()
    assert not [name for name in before if torch.equal(before[name], after[name])]
    # Histories that the model makes anew, from its text too.
    own = ["name=resampled", "train.steps=2", "flow.self_forcing_prob=1"]
    losses = [entry["loss"] for entry in train("scd_wan", *start, *own) if "loss" in entry]
    assert len(losses) == 2 and all(0 < loss < 100 for loss in losses)


def test_every_stage_runs_by_its_command(wan_folder, data_root, overrides, tmp_path):
    """Each stage starts from the export of the one before; the last needs prompts alone."""
    given = [*overrides, *SCD, "optim.lr=1e-3", "train.steps=4", "train.sample_every=0"]
    start = f"init_from={wan_folder}/scd"
    assert main(["encode", "--opt", "options/scd_wan.yml", *given, start]) == 0
    train("scd_wan", *given, start, "name=forced")
    runs = tmp_path / "runs"
    stage = [f"init_from={runs}/forced/exported", f"distill.teacher={runs}/forced/exported"]
    weak = [f"distill.weak_teacher={wan_folder}/scd", "distill.guidance_scale=1.5"]
    train("scd_wan_consistency", *given, *stage, *weak, "name=consistent", "distill.levels=6")
    stage = [f"init_from={runs}/consistent/exported", f"distill.teacher={wan_folder}/wan"]
    (data_root / "train.json").unlink()
    few = ["distill.critic_updates=2", "distill.critic_lr=1e-3", "train.sample_every=4"]
    log = train("scd_wan_distilled", *given, *stage, *few, "name=distilled")
    assert [entry["step"] for entry in log if "dmd_gradient" in entry] == [2, 4]
    assert all(entry["replay_error"] < 1e-4 for entry in log if "replay_error" in entry)
    assert len(list((runs / "distilled/samples").rglob("*.mp4"))) == 2
    weights = [read_all_weights(runs / f"{name}/exported") for name in STAGES]
    for before, after in pairwise(weights):
        assert not [name for name in before if torch.equal(before[name], after[name])]
    about = yaml.safe_load((runs / "distilled/exported/options.yml").read_text())
    assert about["rollout"]["solver"] == "consistency" and about["rollout"]["steps"] == 2


slow = partial(pytest.param, marks=pytest.mark.slow)
FILES = ["scd_wan", slow("scd_wan_consistency"), slow("scd_wan_distilled"), slow("causal_wan")]


@pytest.mark.parametrize("name", FILES)
def test_every_options_file_runs_dry(name, tmp_path, monkeypatch, capsys):
    """On fewer frames, which take the count of the costs less time."""
    monkeypatch.chdir(ROOT)
    given = ["--opt", f"options/{name}.yml", "data.frames=3", "data.root=nowhere"]
    if name == "scd_wan_distilled":
        given.append("distill.weak_teacher=nowhere")
    assert main(["train", "--dry-run", *given]) == 0
    out = capsys.readouterr().out
    assert f"{name}: a step of a miniature of it succeeded on noise" in out
    assert re.search(r"memory +about 1 GPU [\d.]+ GB, 2 GPUs [\d.]+ GB, 8 GPUs [\d.]+ GB", out)
    millions = float(re.search(r"parameters +([\d.]+) M", out)[1])
    assert abs(millions / 1e3 - (1.42 if name == "causal_wan" else 1.68)) < 0.005


def test_costs_are_those_of_a_real_step_and_a_real_frame():
    """Counted from shallow models, against the whole one; and a frame, against arithmetic."""
    options = load_options(
        ROOT / "options/scd_wan.yml",
        [
            *("data.frames=4", "data.frame_size=32", "data.frame_width=48", "model.heads=2"),
            *("model.encoder_layers=4", "model.decoder_layers=5", "wan.decoder_first=2"),
            *("wan.ffn_dim=512", "wan.text_dim=64", "wan.text_length=8"),
        ],
    )
    with torch.device("meta"):
        codec = WanCodec(AutoencoderKLWan())
        model = build_wan(options, 16, 8)
    whole = estimate_step(options, codec, counts_scores=False)
    found = estimate_by_depth(options, codec, counts_scores=False)
    assert (found.flops, found.activation_bytes) == (whole.flops, whole.activation_bytes)
    assert whole.total_parameters == count_parameters(model)
    n, d, f, t = 6, 256, 512, 8  # tokens of a frame, width, inside, of the text
    past = 3
    once, each = frame_flops(model, (16, 4, 6), past, t)

    def block(tokens: int, keys: int, kept: int | None = None) -> int:
        kept = kept or tokens
        own = d * d * (2 * tokens + 2 * kept) + 2 * kept * keys * d
        return 2 * (own + d * d * 2 * kept + 2 * kept * t * d + 2 * kept * d * f)

    ends = 2 * n * d * 64  # patches of 2x2x16 values
    assert once == 4 * block(n, (past + 1) * n) + ends
    assert each == 4 * block(2 * n, 2 * n) + block(2 * n, 2 * n, n) + 2 * ends


def test_videos_that_are_too_narrow_are_named(data_root, overrides, tmp_path, capsys):
    """Scaled to the height of the frames, they do not fill their width; encoding refuses them."""
    narrow = np.zeros((PICTURES, 40, 48, 3), np.uint8)
    write_video(data_root / "narrow.mp4", narrow, fps=16)
    entries = json.loads((data_root / "val.json").read_text())
    entries.append({**entries[0], "video_path": "narrow.mp4"})
    (data_root / "val.json").write_text(json.dumps(entries))
    scaled = [*overrides, *SCD, f"data.resize_shorter={HEIGHT}"]
    assert main(["encode", "--opt", "options/scd_wan.yml", *scaled]) == 0
    capsys.readouterr()
    assert main(["validate", "--opt", "options/scd_wan.yml", *scaled]) == 1
    told = capsys.readouterr().out
    assert told.count("broken:") == 1 and "narrow.mp4: frames of 40x48 pixels, which" in told


def test_prompts_are_validated(data_root, overrides, capsys):
    given = ["--opt", "options/scd_wan_distilled.yml", *overrides, *SCD]
    assert main(["validate", *given]) == 0
    assert "the embeddings of all" in capsys.readouterr().out
    assert main(["encode", *given]) == 1
    assert "data.source=prompts has no videos to encode" in capsys.readouterr().err
    (data_root / "prompts.txt").write_text("a cow")
    assert main(["validate", *given]) == 1
    assert "no embedding of 1 prompts, such as 'a cow'" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["scd_wan", "scd_wan_distilled"])
def test_two_processes_that_shard_equal_one(stage, wan_folder, data_root, overrides, tmp_path):
    given = [*overrides, *SCD, "optim.lr=1e-4", "train.steps=4", "train.sample_every=0"]
    given += [f"init_from={wan_folder}/scd", "optim.warmup_steps=0", "train.save_every=4"]
    if stage == "scd_wan":
        assert main(["encode", "--opt", "options/scd_wan.yml", *given]) == 0
    else:
        given += [f"distill.teacher={wan_folder}/wan", "distill.critic_updates=2"]
    file, runs = ROOT / f"options/{stage}.yml", tmp_path / "runs"
    on_two("sharded-wan", [*given, "name=two", "train.batch_size=1"], file)
    run_experiment(load_options(file, [*given, "name=one"]))
    assert_close(state_of(runs / "two"), state_of(runs / "one"))
    start = read_all_weights(wan_folder / "scd")
    moved = state_of(runs / "one").model
    assert any((moved[name] - tensor).abs().max() > 1e-4 for name, tensor in start.items())


@pytest.mark.slow
def test_keys_steer_a_world_that_is_trained_on_them(wan_folder, data_root, overrides, tmp_path):
    """At the start they have no effect; after training on videos with actions they have one."""
    keys = [*SCD, "model.condition=action", "model.num_conditions=3"]
    given = [*overrides, *keys, f"init_from={wan_folder}/keys", "optim.lr=1e-2"]
    assert main(["encode", "--opt", "options/scd_wan.yml", *given]) == 0
    train("scd_wan", *given, "name=keys", "train.steps=4", "train.sample_every=0")
    text = torch.randn(1, 5, TEXT, generator=torch.Generator().manual_seed(2))
    settings = RolloutOptions(2, guidance="none", guidance_scale=1.0)

    def effect(folder: Path) -> float:
        model, worlds = SCDWan.from_pretrained(folder / "transformer"), []
        for action in (0, 1):
            rollout = Rollout(model, settings, 3)
            noise = torch.Generator().manual_seed(3)
            empty = torch.zeros(1, 0, 16, HEIGHT // 8, WIDTH // 8)
            rollout.reset(empty, generator=noise, text=text)
            pressed = torch.tensor([action])
            worlds.append(torch.stack([rollout.step(pressed) for _ in range(3)]))
        return float((worlds[0] - worlds[1]).abs().max())

    assert effect(wan_folder / "keys") == 0 < 1e-3 < effect(tmp_path / "runs/keys/exported")
    # Distribution matching needs a teacher that knows the keys: Wan itself, trained on them.
    dense = ["model.encoder_layers=0", "model.decoder_layers=0", "model.layers=3"]
    short = ["train.steps=2", "train.sample_every=0"]
    teacher = [*given, *dense, "model.type=bidirectional_wan", "flow.prefix_frames=[0,1]"]
    train("scd_wan", *teacher, f"init_from={wan_folder}/wan_keys", "name=teacher", *short)
    runs = tmp_path / "runs"
    places = [f"init_from={runs}/keys/exported", f"distill.teacher={runs}/teacher/exported"]
    videos = ["data.source=latents", "data.train_list=train.json", "distill.critic_updates=1"]
    train("scd_wan_distilled", *given, *places, *videos, "name=distilled", *short)
    assert effect(runs / "distilled/exported") > 1e-3
    # Action i leads to picture i: of four pictures that are one latent, the first's.
    options = load_options(ROOT / "options/scd_wan.yml", given)
    recorded = np.load(data_root / "1.npz")["actions"]
    clips = CaptionedLatents(options, "train.json", 4)
    for rng in (None, *map(np.random.default_rng, range(8))):  # every clip begins with its video
        assert clips.read(1, 2, rng=rng)["actions"].tolist() == recorded[[0, 1]].tolist()
    assert clips.read(1, 3)["actions"].tolist() == recorded[[0, 1, 5]].tolist()


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("data.source=video", "trained on latents"),
        ("data.source=prompts", "only distill.method=dmd learns without any"),
        ("flow.prediction=data", "Wan predicts velocities"),
        ("model.encoder_frame=joint", "noise makes one pass already"),
        ("model.fusion=add", "token_concat or middle"),
        ("wan.decoder_first=10", "leaves none"),
        ("wan.chunk_frames=3", "only a causal_wan has chunks"),
        ("optim.muon_lr=0.01", "AdamW alone"),
        ("model.num_conditions=4", "contradicts"),
    ],
)
def test_options_that_cannot_work_are_refused(override, complaint):
    with pytest.raises(ScdError, match=re.escape(complaint)):
        load_options(ROOT / "options/scd_wan.yml", [override])


def test_chunks_are_not_resampled():
    chunks = ["wan.chunk_frames=3", "flow.self_forcing_prob=0.5"]
    with pytest.raises(ScdError, match="which makes single frames anew"):
        load_options(ROOT / "options/causal_wan.yml", chunks)


def test_without_videos_there_is_nothing_but_own_rollouts():
    with pytest.raises(ScdError, match=r"with distill\.self_rollout=true"):
        load_options(ROOT / "options/scd_wan_distilled.yml", ["distill.self_rollout=false"])


def test_what_does_not_fit_is_refused(wan_folder, data_root, overrides, tmp_path):
    """Another model, a prompt without an embedding, a clip without a caption, a foreign command."""
    given = [*overrides, *SCD, "train.steps=1", "train.sample_every=0"]

    def refusal(name: str, *more: str) -> str:
        with pytest.raises(ScdError) as refused:
            run_experiment(load_options(ROOT / f"options/{name}.yml", [*given, *more, "name=x"]))
        return str(refused.value)

    prompts = [f"init_from={wan_folder}/scd", f"distill.teacher={wan_folder}/wan"]
    told = refusal("scd_wan_distilled", *prompts, "model.fusion=middle")
    assert "fusion is token_concat there, middle in the options" in told
    told = refusal("scd_wan_distilled", *prompts, "wan.negative_prompt=blurry")
    assert "no embedding of 1 prompts, such as 'blurry'" in told
    assert main(["encode", "--opt", "options/scd_wan.yml", *given]) == 0
    entries = json.loads((data_root / "train.json").read_text())
    del entries[1]["caption"]
    (data_root / "train.json").write_text(json.dumps(entries))
    assert "entry 1 has no caption" in refusal("scd_wan", prompts[0])
    (data_root / "train.json").write_text(json.dumps(entries[:1]))


def test_weights_in_half_precision_are_trained_in_float32(wan_folder, overrides, tmp_path):
    tensors, path = read_all_weights(wan_folder / "scd"), tmp_path / "half.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, path)
    given = [*overrides, *SCD, f"init_from={path}"]
    model = start_wan(load_options(ROOT / "options/scd_wan.yml", given), 16, 8)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, tensors[name].bfloat16().float()), name
        assert tensor.dtype == torch.float32, name


def test_what_a_checkpoint_is_cannot_be_overridden(overrides, tmp_path):
    options = load_options(ROOT / "options/scd_wan.yml", [*overrides, *SCD])
    path = tmp_path / "ema.safetensors"
    save_file({"x": torch.zeros(1)}, path, {"options": json.dumps(options_to_dict(options))})
    assert options_in(path, ["rollout.steps=7"]).rollout.steps == 7
    for override in ("model.fusion=middle", "wan.decoder_first=0"):
        with pytest.raises(ScdError, match=r"options of model and wan are the checkpoint's"):
            options_in(path, [override])


def test_teachers_are_of_the_kind_that_a_method_needs(wan_folder, data_root, overrides, tmp_path):
    """A causal Wan has the tensors of Wan itself: only its kind tells them apart."""
    dense = ["model.encoder_layers=0", "model.decoder_layers=0", "model.layers=3"]
    sizes = {"scd_wan": SCD, "causal_wan": dense}
    sizes["bidirectional_wan"] = [*dense, "flow.prefix_frames=[0,1]"]
    checkpoints = {}
    for kind, folder in (
        ("scd_wan", "scd"),
        ("causal_wan", "causal"),
        ("bidirectional_wan", "wan"),
    ):
        given = [*overrides, *sizes[kind], f"model.type={kind}", f"init_from={wan_folder}/{folder}"]
        options = load_options(
            ROOT / "options/scd_wan.yml", [*given, f"name={kind}", "train.sample_every=0"]
        )
        path = tmp_path / f"{kind}.safetensors"
        checkpoints[kind] = path
        metadata = {"options": json.dumps(options_to_dict(options)), "step": "1"}
        save_file(read_all_weights(wan_folder / folder), path, metadata)
    given = [*overrides, *SCD, f"init_from={wan_folder}/scd"]
    scd = start_wan(load_options(ROOT / "options/scd_wan.yml", given), 16, 8)
    causal = CausalWan.from_wan(tiny_wan(num_layers=3))

    def teacher(student, method: str, path: Path):
        options = load_options(ROOT / "options/scd_wan.yml", [*overrides, *SCD])
        options.distill.method, options.distill.teacher = method, str(path)
        return teacher_wan(options, student)

    fits = {
        "dmd": (scd, ("own", "wan"), ("scd", "causal"), "Wan itself", BidirectionalWan),
        "consistency": (causal, ("causal",), ("own", "wan", "scd"), "a causal teacher", CausalWan),
    }
    of_checkpoints = {"wan": "bidirectional_wan", "causal": "causal_wan", "scd": "scd_wan"}
    for method, (student, good, bad, message, kind) in fits.items():
        for name in (*good, *bad):
            paths = [wan_folder / name]
            if name in of_checkpoints:
                paths.append(checkpoints[of_checkpoints[name]])
            for path in paths:
                if name in good:
                    found = teacher(student, method, path)
                    assert type(found) is kind and not any(
                        p.requires_grad for p in found.parameters()
                    )
                else:
                    with pytest.raises(ScdError, match=f"distill.method={method} needs {message}"):
                        teacher(student, method, path)
    plain = tmp_path / "plain.safetensors"
    save_file(read_all_weights(wan_folder / "wan"), plain)
    with pytest.raises(ScdError, match="holds no known model"):
        teacher(scd, "dmd", plain)


def test_a_checkpoint_of_a_run_generates_and_is_exported(
    wan_folder, data_root, overrides, tmp_path, capfd
):
    """In the middle of a run, as at its end; other commands name those that are for Wans."""
    given = [*overrides, *SCD, f"init_from={wan_folder}/scd", "optim.lr=1e-3"]
    assert main(["encode", "--opt", "options/scd_wan.yml", *given]) == 0
    train(
        "scd_wan", *given, "name=run", "train.steps=2", "train.sample_every=0", "train.save_every=1"
    )
    run, out = tmp_path / "runs/run", tmp_path / "out"
    first, last = (run / f"checkpoints/step-0000000{n}/ema.safetensors" for n in (1, 2))
    for checkpoint in (first, last):
        assert main(["export", str(checkpoint), "--out", str(out / checkpoint.parent.name)]) == 0
    middle, end, exported = (out / first.parent.name, out / last.parent.name, run / "exported")
    weights = [read_all_weights(folder) for folder in (middle, end, exported)]
    assert all(torch.equal(weights[1][name], tensor) for name, tensor in weights[2].items())
    assert not all(torch.equal(weights[0][name], tensor) for name, tensor in weights[2].items())
    assert (end / TRAINING_FILE).read_text() == (exported / TRAINING_FILE).read_text()
    card = (middle / "README.md").read_text()
    for text in ("license: apache-2.0", "SCDWan: 2 encoder and 2 decoder layers", "step 1 of 2"):
        assert text in card
    assert "48x32 pixels, in clips of 3 latent frames" in card and "scd wan generate step-" in card
    assert "--fps 16 " in card and "negative_prompt_embeds=negative" in card
    code = card.split("```python\n")[1].split("```")[0].replace('"step-00000001"', "folder")
    text = PromptFolder(data_root).embedding(CAPTIONS[0])[None].float()
    given = {"folder": middle, "text": text, "negative": torch.zeros_like(text)}
    exec(code.replace("width=48", "width=48, num_frames=5"), given)
    assert given["frames"].shape == (1, 5, 3, HEIGHT, WIDTH)
    size = ["--height", str(HEIGHT), "--width", str(WIDTH), "--frames", "5"]
    asked = ["--prompt", CAPTIONS[0], "--prompt-embeds", str(data_root), *size]
    assert main(["wan", "generate", str(first), *asked, "--out", str(out / "v.mp4")]) == 0
    text = PromptFolder(data_root).embedding(CAPTIONS[0])[None].float()
    videos = [
        load_pipeline(model, ["rollout.steps=1"])(
            prompt_embeds=text,
            negative_prompt_embeds=0 * text,
            height=HEIGHT,
            width=WIDTH,
            num_frames=5,
            generator=torch.Generator().manual_seed(0),
        ).frames
        for model in (first, middle, exported)
    ]
    # Where weights lie in memory can decide how a product is summed: 2e-5 was seen.
    torch.testing.assert_close(videos[0], videos[1], atol=2e-4, rtol=0)
    assert (videos[2] - videos[0]).abs().max() > 0.1
    assert main(["export", str(first), "--out", str(middle), "--dtype", "bfloat16"]) == 0
    assert {t.dtype for t in read_all_weights(middle).values()} == {torch.float32, torch.bfloat16}
    for arguments, message in (
        (["export", str(first), "--out", str(middle), "model.fusion=middle"], "leave them out"),
        (["evaluate", str(first)], "a scd_wan, which other commands are for: `scd wan generate`"),
        (["evaluate", str(exported)], "the pipeline of a Wan, which other commands are for"),
        (["export", str(exported), "--out", str(middle)], "the pipeline of a Wan"),
        (["play", "--model", str(exported)], "the pipeline of a Wan"),
    ):
        assert main(arguments) == 1
        last_line = capfd.readouterr().err.splitlines()[-1]
        assert last_line.startswith("error: ") and message in last_line
