"""Options files and overrides: what is read, and what is refused, in one line that names it."""

import json
import random
import re
from pathlib import Path

import pytest

from scd.errors import ScdError
from scd.models.load import options_for_use
from scd.options import (
    Options,
    RolloutOptions,
    check_rollout,
    known_keys,
    load_options,
    load_training_options,
    options_from_json,
    options_to_dict,
    options_to_yaml,
    rules,
    with_former_names,
    with_present_names,
)
from scd.options.other_names import RENAMED

ROOT = Path(__file__).parent.parent
SHIPPED = sorted((ROOT / "options").glob("*.yml"))
SMALL = """\
name: small
task: world_model
data: {root: somewhere, frames: 4}
model: {encoder_layers: 2, decoder_layers: 1}
train: {steps: 10, batch_size: 2}
eval: {context_frames: 1, new_frames: 3}
"""
DENSE = [
    *("model.type=causal_dit", "model.layers=3"),
    *("model.encoder_layers=0", "model.decoder_layers=0"),
]
AUTOENCODER = [
    "task=autoencoder",
    *(f"autoencoder.{side}_block_types=[ResBlock, ResBlock]" for side in ("encoder", "decoder")),
    *(f"autoencoder.{side}_channels=[32, 64]" for side in ("encoder", "decoder")),
    *(f"autoencoder.{side}_layers=[0, 1]" for side in ("encoder", "decoder")),
]
ACTIONS = ["model.condition=action", "model.num_conditions=4"]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "small.yml"
    path.write_text(SMALL)
    return path


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(ScdError) as caught:
        load_options(path, list(overrides))
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_file_loads(path: Path) -> None:
    assert load_training_options(path).name == path.stem


@pytest.mark.parametrize("name", ["scd_ucf101_label", "scd_dmlab", "scd_bair"])
def test_the_readme_makes_dense_baselines_of(name: str) -> None:
    """Its overrides, of one file there, work for each file without a baseline of its own."""
    readme = (ROOT / "options/README.md").read_text(encoding="utf-8")
    command = readme[readme.index("./scripts/train.sh options/scd_dmlab.yml name=") :]
    command = command[: command.index("```")].replace("\\\n", " ")
    overrides = [word for word in command.split() if "=" in word]
    options = load_options(ROOT / f"options/{name}.yml", overrides)
    assert options.model.type == "causal_dit" and options.name == "causal_dit_dmlab"


def test_values_have_the_types_that_are_declared(file: Path) -> None:
    options = load_options(
        file,
        [
            "train.compile=yes",
            "optim.lr=1e-3",
            "optim.betas=[0.5, 0]",
            "data.action_names=[on, no, 1.10, turn left]",  # YAML has booleans and numbers here
            "autoencoder.path=null",
            "name=2026-01-01",
            "output_root=a=b",
        ],
    )
    assert options.train.compile is True
    assert options.optim.lr == 0.001
    assert options.optim.betas == [0.5, 0.0] and type(options.optim.betas[1]) is float
    assert options.data.action_names == ["on", "no", "1.10", "turn left"]
    assert options.autoencoder.path is None
    assert str(options.output) == "a=b/2026-01-01"
    assert options.train.steps == 10 and options.data.frames == 4  # of the file
    assert options.flow == Options().flow  # untouched


def test_later_overrides_win(file: Path) -> None:
    options = load_options(file, ["train.steps=3", "train={steps: 4, workers: 0}"])
    assert (options.train.steps, options.train.workers, options.train.batch_size) == (4, 0, 2)


def test_options_survive_a_checkpoint(file: Path) -> None:
    for path in [file, *SHIPPED]:
        options = load_options(path, ["train.mixed_precision=fp32", "optim.lr=3.3e-05"])
        text = json.dumps(options_to_dict(options))
        assert options_from_json(text, "checkpoint") == options
    changed = options_from_json(text, "checkpoint", ["eval.videos=7"])
    assert changed.eval.videos == 7 and changed != options
    for damaged in ("", "{", "[]", "null", '"a"', '{"name": {}}', '{"data": 3}', "[" * 10**5):
        with pytest.raises(ScdError, match=r"^checkpoint: ."):
            options_from_json(damaged, "checkpoint")


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("train.stepz", "train.steps"),
        ("steps", "train.steps"),
        ("trian.steps", "trian"),
        ("rollout.windows", "did you mean 'rollout.window'?"),
        ("train.seed", "did you mean 'seed'?"),
        ("optim.learning_rate", "did you mean 'optim.lr'?"),
        ("rollout.num_inference_steps", "did you mean 'train.steps' or 'rollout.steps'?"),
        ("model.encoder_layer", "model.encoder_layers"),
        ("optm", "optim"),
    ],
)
def test_an_unknown_key_is_named_with_its_neighbour(file: Path, key: str, near: str) -> None:
    override = f"{key}=3"
    message = refusal(file, override)
    assert message.startswith(f"override {override!r}: unknown key ")
    assert near in message
    *sections, name = key.split(".")
    file.write_text(SMALL + "".join(f"{s}:\n  " for s in sections) + f"{name}: 3\n")
    if not {"train", "model"} & set(sections):  # they would stand twice
        message = refusal(file)
        assert message.startswith(f"{file}: unknown key ") and near in message


def test_dotted_keys_in_a_file_are_explained(file: Path) -> None:
    file.write_text(SMALL + "optim.lr: 1.0\n")
    assert refusal(file) == (
        f"{file}: unknown key 'optim.lr': write sections as nested keys, not with dots"
    )


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("train.steps=many", "train.steps"),
        ("train.steps=1.5", "train.steps"),
        ("train.steps=null", "train.steps"),
        ("train.steps=", "train.steps"),
        ("train.steps.x=1", "train.steps"),
        ("train.compile=maybe", "train.compile"),
        ("optim.betas=0.9", "optim.betas"),
        ("optim.betas=null", "optim.betas"),
        ("optim.betas=[a, b]", "optim.betas"),
        ("optim.betas={a: 1}", "optim.betas"),
        ("optim.betas.0=0.5", "optim.betas"),
        ("eval.seeds=[[0]]", "eval.seeds"),
        ("eval.seeds=[null]", "eval.seeds"),
        ("data=3", "data"),
        ("data=null", "data"),
        ("data=[root]", "data"),
        ("name=[a]", "name"),
        ("name=${nothing}", "name"),
        ("seed=${name}", "seed"),
        ("seed=${seed}", "seed"),
        ("name=${", "name"),
    ],
)
def test_a_wrong_type_is_named(file: Path, override: str, key: str) -> None:
    message = refusal(file, override)
    assert key in message.replace(repr(override), "")
    assert override in message or str(file) in message
    section, _, name = key.rpartition(".")
    value = json.dumps(["wrong", {"type": None}])
    unlisted = "\n".join(line for line in SMALL.splitlines() if not line.startswith(section or key))
    file.write_text(f"{unlisted}\n{section}: {{{name}: {value}}}" if section else f"{key}: {value}")
    message = refusal(file)
    assert message.startswith(f"{file}: ") and key in message


@pytest.mark.parametrize("text", ["train.steps", "=3", " =3", "", "train.steps=[1", "name='"])
def test_an_override_that_is_none_is_named(file: Path, text: str) -> None:
    assert refusal(file, text).startswith(f"override {text!r}: ")


def test_every_missing_value_is_named(file: Path) -> None:
    file.write_text('data: {frames: 4}\ntrain: {steps: "???", batch_size: 2}\n')
    assert refusal(file) == (
        f"{file}: no value for data.root, eval.context_frames, eval.new_frames, name, task, "
        f"train.steps"
    )


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["train.batch_size=0"], "train.batch_size must be above 0"),
        (["train.workers=-1"], "train.workers must not be negative"),
        (["train.val_loss_every=-1"], "train.val_loss_every must not be negative"),
        ([*AUTOENCODER, "train.val_loss_every=5"], "only task world_model has a loss by noise"),
        (["train.profile_steps=[3]"], "train.profile_steps=[3]: the first and the last step"),
        (["train.profile_steps=[0, 3]"], "train.profile_steps=[0, 3]: the first and the last"),
        (["train.profile_steps=[4, 3]"], "train.profile_steps=[4, 3]: the first and the last"),
        (["train.profile_steps=[3, 11]"], "from 1 to train.steps=10"),
        (["train.wandb_project=a/b"], "train.wandb_project must be a possible name of a wandb"),
        (["train.wandb_project=''"], "train.wandb_project must be a possible name of a wandb"),
        (["seed=-1"], "seed must lie between 0 and 2^63 - 1, but is -1"),
        (["eval.context_frames=-1"], "eval.context_frames must not be negative"),
        (["seed=9223372036854775808"], "seed must lie between 0 and 2^63 - 1"),
        (["flow.clean_fraction=1.1"], "flow.clean_fraction must lie between 0 and 1"),
        (["optim.lr=nan"], "optim.lr must be finite"),
        (["optim.muon_lr=0"], "optim.muon_lr must be above 0"),
        (["optim.lr=inf"], "optim.lr must be finite"),
        (["flow.logit_mean=-inf"], "flow.logit_mean must be finite"),
        (["optim.skip_grad_norm=0"], "optim.skip_grad_norm must be above 0"),
        (["rollout.guidance_interval=[0.7, 0.3]"], "the lowest and the highest noise level"),
        (["flow.self_forcing_sigma=[0, 1]"], "the lowest and the highest noise level, above 0"),
        (["rollout.window=2", "rollout.sink_frames=2"], "must lie below rollout.window=2"),
        (["flow.encoder_input=noisy", "flow.self_forcing_prob=1"], "flow.self_forcing_prob=1.0 n"),
        (["flow.encoder_input=noisy", "flow.history_noise_max=1"], "flow.history_noise_max=1.0 n"),
        ([*DENSE, "rollout.guidance=none", "rollout.compile=true"], "see a single frame"),
        (["eval.context_frames=0"], "eval.context_frames=0 needs model.first_frame=true"),
        (
            [*AUTOENCODER, "discriminator.weight=1", "autoencoder.path=a", "init_from=b"],
            "init_from with autoencoder.path: this stage starts from autoencoder.path",
        ),
        ([*AUTOENCODER, "optim.muon_lr=1"], "only task world_model has blocks with matrices"),
        (["name=a/b"], "name must be a possible name of a folder"),
        (["name=.."], "name must be a possible name of a folder"),
        (['name="a\\nb"'], "name must be a possible name of a folder"),
        (["optim.schedule=wsd"], "optim.decay_steps=0 with optim.schedule=wsd: only wsd has"),
        (["optim.decay_steps=2"], "optim.decay_steps=2 with optim.schedule=constant"),
        (
            ["optim.schedule=wsd", "optim.decay_steps=8", "optim.warmup_steps=3"],
            "optim.warmup_steps=3 and optim.decay_steps=8 are more than train.steps=10",
        ),
        (["optim.min_lr_ratio=0.1"], "optim.schedule=constant never falls"),
        (["optim.ema_sigma_rel=[0.05, 0.05]"], "one or more different numbers"),
        (["optim.ema_sigma_rel=[]"], "one or more different numbers"),
        (["optim.ema_sigma_rel=[0.3]"], "in 0.0001..0.28"),
        ([*AUTOENCODER, "train.snapshot_every=2"], "averages world models, not autoencoders"),
        (["optim.betas=[0.9]"], "optim.betas must be two numbers"),
        (["optim.betas=[0.9, 1.0]"], "optim.betas must be two numbers"),
        (["eval.trajectories=2"], "eval.seeds=[0] for eval.trajectories=2"),
        ([*ACTIONS, "eval.swapped_actions=[1, 4]"], "eval.swapped_actions=[1, 4]"),
        ([*ACTIONS, "eval.swapped_actions=[1, 1]"], "eval.swapped_actions=[1, 1]"),
        ([*ACTIONS, "eval.swapped_actions=[-1, 1]"], "eval.swapped_actions=[-1, 1]"),
        ([*ACTIONS, "eval.swapped_actions=[1]"], "eval.swapped_actions=[1]"),
        (  # however many there are, they are not counted through
            ["model.condition=action", "model.num_conditions=1e15", "eval.swapped_actions=[1, -1]"],
            "eval.swapped_actions=[1, -1]",
        ),
        (
            ["model.condition=label", "model.num_conditions=4", "eval.swapped_actions=[1, 2]"],
            "a model with model.condition=action",
        ),
        (
            ["model.decoder_layers=0"],
            "model.decoder_layers=0 contradicts model.type=scd: scd needs it above 0",
        ),
        (["model.layers=3"], "model.layers=3 contradicts model.type=scd"),
        (["model.type=causal_dit"], "model.encoder_layers=2 contradicts model.type=causal_dit"),
        ([*DENSE, "rollout.guidance=context"], "guidance=context contradicts model.type"),
        (["data.frames=1"], "at least 2 frames"),
        (["model.condition=action"], "contradicts model.num_conditions=0"),
        (["model.num_conditions=3"], "contradicts model.num_conditions=3"),
        (["rollout.guidance=condition"], "contradicts model.condition=none"),
        ([*ACTIONS, "data.frame_stride=2"], "data.frame_stride must be 1"),
        (["data.source=latents"], "data.source=latents needs autoencoder.path"),
        (["data.resize_shorter=63"], "data.resize_shorter=63 leaves too little"),
        (["data.resize_shorter=0"], "data.resize_shorter=0 leaves too little"),
        ([*ACTIONS, "data.mirror=true"], "left and right would be swapped"),
        (
            ["data.mirror=true", "data.source=latents", "autoencoder.path=somewhere"],
            "data.mirror needs data.source=video",
        ),
        ([*AUTOENCODER, "data.source=latents"], "needs data.source=video"),
        (
            ["task=autoencoder"],
            "autoencoder.encoder_block_types, _channels and _layers need one entry",
        ),
        (
            [*AUTOENCODER, "autoencoder.decoder_layers=[1]"],
            "autoencoder.decoder_block_types, _channels",
        ),
        ([*AUTOENCODER, "autoencoder.latent_channels=0"], "latent_channels must be above 0"),
        ([*AUTOENCODER, "autoencoder.latent_channels=48"], "latent_channels=48"),
        ([*AUTOENCODER, "autoencoder.encoder_channels=[0, 64]"], "must be above 0"),
        ([*AUTOENCODER, "autoencoder.decoder_layers=[0, -1]"], "not be negative"),
        (
            [
                *AUTOENCODER,
                "autoencoder.encoder_block_types=[ResBlock]",
                "autoencoder.encoder_channels=[64]",
                "autoencoder.encoder_layers=[1]",
            ],
            "need equally many stages",
        ),
        (
            [
                *("task=autoencoder", "autoencoder.path=a"),
                *("discriminator.weight=1", "discriminator.layers=1e15"),
            ],
            "too many for frames of 64 pixels",
        ),
        (
            [*AUTOENCODER, "data.frame_size=65"],
            "data.frame_size=65 is not divisible by the",
        ),
    ],
)
def test_what_cannot_work_is_refused(file: Path, overrides: list[str], complaint: str) -> None:
    message = refusal(file, *overrides)
    assert message.startswith(f"{file}: ") and complaint in message


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        ("task", "world", "is 'world', not one of world_model, autoencoder; did you mean 'world_"),
        ("eval.fvd_precision", "fp16", "is 'fp16', not one of fp32, bf16; did you mean 'bf16'?"),
        ("rollout.solver", "heun", "is 'heun', not one of euler, multistep, consistency"),
        ("rollout.solver", "null", "is None, not one of euler, multistep, consistency"),
        ("train.trackers", "[wandb, wandbb]", "has 'wandbb', not one of tensorboard, wandb; did"),
        (
            "eval.comparisons",
            "[others]",
            "has 'others', not one of repeat, autoencoder, other, other_keys;",
        ),
        ("autoencoder.encoder_block_types", "[Resblock]", "not one of ResBlock, EfficientViTBl"),
    ],
)
def test_an_unknown_choice_is_named_with_its_neighbour(
    file: Path, key: str, value: str, complaint: str
) -> None:
    override = f"{key}={value}"
    message = refusal(file, override)
    assert message.startswith(f"override {override!r}: {key} ") and complaint in message
    section, _, name = key.rpartition(".")
    lines = [line for line in SMALL.splitlines() if not line.startswith(f"{section or name}:")]
    lines.append(f"{section}: {{{name}: {value}}}" if section else f"{name}: {value}")
    file.write_text("\n".join(lines))
    message = refusal(file)
    assert message.startswith(f"{file}: {key} ") and complaint in message


def test_every_rule_can_say_what_is_wrong(file: Path) -> None:
    """A message names only options that there are."""
    options = load_options(file)
    first, second = rules.FIRST_STAGE, rules.DECODER_STAGE
    every = [
        *rules.COMMON,
        *rules.WORLD_MODEL,
        *rules.DISTILLATION,
        *rules.TRAINING,
        *rules.AUTOENCODER,
        *first,
        *second,
    ]
    assert len(every) > 40
    for _, message in every:
        assert "{" not in message.format(**vars(options))


def test_the_counterparts_of_the_refusals_load(file: Path) -> None:
    for overrides in [
        AUTOENCODER,
        [*AUTOENCODER, "data.frame_size=66", "data.frames=1", "data.frame_stride=9"],
        [*ACTIONS, "eval.swapped_actions=[3, 0]", "rollout.guidance=condition"],
        ["eval.trajectories=2", "eval.seeds=[4, 4]"],
        ["data.frame_stride=2"],
        ["train.profile_steps=[1, 10]", "train.val_loss_every=1", "train.wandb_project=my worlds"],
        [*DENSE, "rollout.guidance=none"],
        ["data.resize_shorter=64", "data.mirror=true"],
        ["data.resize_shorter=null"],
        ["data.source=latents", "autoencoder.path=somewhere"],
        ["train.trackers=[tensorboard, wandb]", "seed=9223372036854775807"],
        ["optim.schedule=wsd", "optim.decay_steps=8", "optim.min_lr_ratio=0.1"],
        [
            *("task=autoencoder", "autoencoder.path=a", "autoencoder.world_model=x"),
            "autoencoder.predicted_frames=3",
        ],
    ]:
        load_options(file, overrides)
    whole_clip = ["data.frames=8", "distill.context_frames=2", "rollout.window=7"]
    load_training_options(ROOT / "options/scd_doom_distilled.yml", whole_clip)
    upright = ["data.frame_size=832", "data.frame_width=480"]
    load_options(ROOT / "options/scd_wan.yml", upright)
    with pytest.raises(ScdError, match="leaves too little"):
        load_options(ROOT / "options/scd_wan.yml", [*upright, "data.resize_shorter=470"])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a",
        "5",
        "null",
        "[1, 2]",
        "- name: a",
        "{",
        "data: [a",
        "\tname: a",
        "\x00",
        SMALL + "name: twice\n",
        SMALL + "data: {root: b}\n",
        SMALL + "---\nname: b\n",
        SMALL + "seed: *nowhere\n",
        SMALL + "seed: !!python/object/apply:os.system [exit]\n",
        SMALL + "? [a]\n: b\n",
        SMALL + "x: &x [*x]\n",
        "[" * 10_000,
    ],
)
def test_broken_yaml_is_refused(file: Path, text: str) -> None:
    file.write_text(text)
    assert refusal(file).startswith(f"{file}: ")


def test_a_broken_line_is_named(file: Path) -> None:
    file.write_text(SMALL + "optim: {lr: 1\nmodel: {}\n")
    assert "(line 8: " in refusal(file)


def test_files_that_cannot_be_read_are_named(file: Path) -> None:
    near = file.with_name("smal.yml")
    assert refusal(near) == f"{near}: no such options file; did you mean {file}?"
    far = file.with_name("zzz.yml")
    assert refusal(far) == f"{far}: no such options file"
    assert refusal(file.parent / "no" / "small.yml").endswith("no such options file")
    assert refusal(file.parent).startswith(f"{file.parent}: not a readable")
    assert refusal(file / "x.yml").startswith(f"{file / 'x.yml'}: not a readable")
    file.write_bytes(b"\xff\xfe\x00")
    assert refusal(file).startswith(f"{file}: not a readable")


def test_mutated_files_load_or_are_refused(file: Path) -> None:
    """Whatever stands in a file, there is no other error and no message of several lines."""
    rng = random.Random(0)
    text = (ROOT / "options/scd_doom.yml").read_text()
    alphabet = "\n\t :-[]{},#&*!|>'\"%@`~?$.0eé\x00\\" + text
    refused = 0
    for _ in range(200):
        mutated = text
        for _ in range(rng.randint(1, 4)):
            start = rng.randrange(len(mutated))
            end = start + rng.choice([0, 0, 1, 1, 1, 8])
            new = "".join(rng.choices(alphabet, k=rng.choice([0, 1, 1, 3])))
            mutated = mutated[:start] + new + mutated[end:]
        file.write_text(mutated, encoding="utf-8")
        try:
            load_options(file)
        except ScdError as error:
            assert "\n" not in str(error) and str(error).startswith(f"{file}: ")
            refused += 1
    assert 50 < refused < 200


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("1e5", 100_000),
        ("1E3", 1000),
        ("2.5e2", 250),
        ("1e+2", 100),
        ("128.0", 128),
        ("1_000", 1000),
    ],
)
def test_whole_numbers_are_integers_however_they_are_written(
    file: Path, text: str, steps: int
) -> None:
    overrides = [f"train.steps={text}", f"eval.seeds=[{text}]", f"data.resize_shorter={text}"]
    options = load_options(file, overrides)
    found = (options.train.steps, options.eval.seeds, options.data.resize_shorter)
    assert found == (steps, [steps], steps) and type(found[0]) is int
    assert load_options(file, ["seed=9007199254740993e0"]).seed == 2**53 + 1  # no float is that
    for wrong in ("1e-1", "2.5", "1e999", "nan", "inf", "1e", "0x10"):
        assert f"override 'train.steps={wrong}': train.steps" in refusal(
            file, f"train.steps={wrong}"
        )


@pytest.mark.parametrize("none", ["None", "none", "null", "~", ""])
def test_none_is_null_where_there_may_be_none(file: Path, none: str) -> None:
    keys = ("autoencoder.path", "init_from", "data.resize_shorter", "optim.muon_lr")
    options = load_options(file, [f"{key}={none}" for key in keys])
    assert (options.autoencoder.path, options.init_from) == (None, None)
    assert (options.data.resize_shorter, options.optim.muon_lr) == (None, None)
    names = ["data.action_names=[None, none]"]  # are names
    assert load_options(file, names).data.action_names == ["None", "none"]


def test_no_folder_is_called_none_by_mistake(file: Path) -> None:
    for key in ("output_root", "data.root"):
        assert f"{key} must be a folder" in refusal(file, f"{key}=None")
        load_options(file, [f"{key}=./None"])


def test_merge_keys_take_sections_over(file: Path) -> None:
    text = SMALL.replace("train: {", "train: &few {")
    assert text != SMALL
    file.write_text(text)
    few = load_options(file).train
    file.write_text(
        SMALL.replace("train: {", "train:\n  {<<: [{batch_size: 5, workers: 7}, {workers: 8}], ")
    )
    merged = load_options(file).train
    # What the section says itself goes first, then the first of those merged.
    assert (merged.batch_size, merged.workers) == (few.batch_size, 7)
    file.write_text(SMALL + "flow:\n  <<: {eta: 1}\n")
    assert "unknown key 'flow.eta'" in refusal(file)
    file.write_text(SMALL + "flow:\n  <<: 3\n")
    assert "line 8: << takes a section" in refusal(file)
    file.write_text(SMALL + "flow: &flow\n  <<: *flow\n")
    assert "not a readable options file" in refusal(file)
    file.write_text(SMALL + "flow:\n  <<: {noise_draws: 1}\n  <<: {noise_draws: 2}\n")
    assert "a key stands twice" in refusal(file)


def test_merges_of_merges_stay_small(file: Path) -> None:
    """Nine times nine times ... the same keys: of a mapping that is refused at once."""
    lines = ["a0: &a0 {x: 1}"]
    lines += [f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}" for i in range(1, 40)]
    file.write_text("\n".join(lines))
    assert "unknown key 'a0'" in refusal(file)


def test_text_that_is_not_utf8_is_refused(file: Path) -> None:
    assert "caf\\udce9" in refusal(file, "data.root=caf\udce9")
    written = options_to_dict(load_options(file))
    written["data"]["root"] = "caf\udce9"
    with pytest.raises(ScdError, match=r"data\.root is not UTF-8"):
        options_from_json(json.dumps(written), "checkpoint")


# --- Renamed options

OLD = """\
name: old
task: autoencoder
data: {root: somewhere, frames: 1}
autoencoder: {path: somewhere}
adversary: {weight: 0.3, layers: 2}
flow: {history_noise: 0.2, own_history: 0.4}
optim: {adversary_lr: 1e-3}
train: {steps: 1, batch_size: 1, mixed_precision: no}
rollout: {spacing: reference, window: 4, window_first: 2}
eval: {context_frames: 1, new_frames: 1}
"""


def renamed_values(options: Options) -> list:
    return [
        *(options.discriminator.weight, options.discriminator.layers),
        *(options.flow.history_noise_max, options.flow.self_forcing_prob),
        *(options.optim.discriminator_lr, options.train.mixed_precision),
        *(options.rollout.spacing, options.rollout.sink_frames),
    ]


def test_removed_options_load_where_they_did_nothing(tmp_path: Path) -> None:
    old = tmp_path / "old.yml"
    old.write_text(OLD.replace("{path: somewhere}", "{path: somewhere, latent_noise: 0.0}"))
    assert renamed_values(load_options(old)) == [0.3, 2, 0.2, 0.4, 1e-3, "fp32", "diffusers", 2]
    with pytest.raises(ScdError, match=r"latent_noise is no longer an option"):
        load_options(old, ["autoencoder.latent_noise=0.1"])


def test_renamed_options_load_under_their_former_names(tmp_path: Path) -> None:
    """In files, on top of a base, in overrides and in checkpoints."""
    old = tmp_path / "old.yml"
    old.write_text(OLD)
    expected = [0.3, 2, 0.2, 0.4, 1e-3, "fp32", "diffusers", 2]
    assert renamed_values(load_options(old)) == expected
    above = tmp_path / "above.yml"
    above.write_text("base: old.yml\nname: above\ndiscriminator: {layers: 3}\n")
    assert renamed_values(load_options(above)) == [0.3, 3, *expected[2:]]
    overrides = ["optim.adversary_lr=0.5", "train.mixed_precision=auto", "adversary={weight: 1}"]
    options = load_options(old, [*overrides, "flow.self_forcing_prob=0.1"])
    assert renamed_values(options) == [1, 2, 0.2, 0.1, 0.5, "auto", "diffusers", 2]

    new = options_to_dict(load_options(old))
    former = json.loads(json.dumps(new))
    former["adversary"] = former.pop("discriminator")
    former["optim"]["adversary_lr"] = former["optim"].pop("discriminator_lr")
    former["flow"]["history_noise"] = former["flow"].pop("history_noise_max")
    former["flow"]["own_history"] = former["flow"].pop("self_forcing_prob")
    former["rollout"]["spacing"] = "reference"
    former["rollout"]["window_first"] = former["rollout"].pop("sink_frames")
    former["train"]["mixed_precision"] = "no"
    assert options_from_json(json.dumps(former), "checkpoint") == load_options(old)
    former["autoencoder"]["latent_noise"] = 0.0
    before = json.dumps(former)
    assert with_present_names(former, "checkpoint") == new
    assert json.dumps(former) == before  # it is not changed


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("adversary: {weight: 0}\ndiscriminator: {weight: 0}\n", "adversary and discriminator are"),
        (
            "flow: {own_history: 0.1, self_forcing_prob: 0.1}\n",
            "flow.own_history and flow.self_forcing_prob are the same option: keep flow.self",
        ),
        ("flow: {own_history: 2}\n", "flow.self_forcing_prob must lie between 0 and 1"),
        ("flow: {own_histroy: 1}\n", "unknown key 'flow.own_histroy'"),
        ("flow: [own_history]\n", "flow is a section of options"),
        ("rollout: {spacing: [reference]}\n", "rollout.spacing takes a single value"),
    ],
)
def test_renamed_options_are_checked_like_others(file: Path, text: str, complaint: str) -> None:
    file.write_text(SMALL + text)
    message = refusal(file)
    assert message.startswith(f"{file}: ") and complaint in message


def test_the_table_of_renamed_options_leads_to_options() -> None:
    known = known_keys()
    for old, new in RENAMED.items():
        old_key, _, old_value = old.partition("=")
        new_key, _, new_value = new.partition("=")
        assert new_key in known and old_key.rpartition(".")[0] == new_key.rpartition(".")[0]
        assert (old_key == new_key) if old_value else (old_key not in known)
        assert bool(old_value) == bool(new_value)


@pytest.mark.parametrize("name", ["scd_doom", "scd_doom_distilled"])
def test_the_shipped_models_are_those_of_the_options(name: str) -> None:
    options = load_options(ROOT / f"assets/pretrained/{name}/options.yml")
    written = load_options(ROOT / f"options/{name}.yml")
    assert (options.model, options.data) == (written.model, written.data)


@pytest.mark.parametrize(
    "overrides",
    [
        ["rollout.solver=euler"],
        ["rollout.window=31", "rollout.sink_frames=4"],
        ["rollout.guidance=context", "rollout.guidance_scale=1.5"],
    ],
    ids=["solver", "window", "guidance"],
)
def test_a_student_may_be_used_otherwise_than_it_was_trained(overrides: list[str]) -> None:
    student = ROOT / "assets/pretrained/scd_doom_distilled"
    assert options_for_use(student, overrides=overrides).distill.method == "dmd"
    with pytest.raises(ScdError, match=r"with (distill\.method=dmd|rollout\.solver=euler)"):
        load_training_options(ROOT / "options/scd_doom_distilled.yml", overrides)


@pytest.mark.parametrize(
    ("name", "overrides", "complaint"),
    [
        (
            "causal_dit_minecraft",
            ["flow.condition_dropout=0"],
            "the null condition, which flow.condition_dropout=0.0 does not train",
        ),
        (
            "causal_dit_minecraft",
            ["flow.condition_dropout=1"],
            "flow.condition_dropout=1.0 does not train",
        ),
        ("scd_doom", ["data.action_names=[a, b]"], "name all, or none"),
    ],
)
def test_what_trains_nothing_is_refused(name: str, overrides: list[str], complaint: str) -> None:
    path = ROOT / f"options/{name}.yml"
    load_options(path, overrides)  # a model can be used with it
    with pytest.raises(ScdError, match=re.escape(complaint)):
        load_training_options(path, overrides)


# --- A base


def test_a_base_is_merged_key_by_key(tmp_path: Path, file: Path) -> None:
    above = tmp_path / "sub/above.yml"
    above.parent.mkdir()
    above.write_text(
        "base: ../small.yml\nname: above\ntrain: {batch_size: 5}\noptim: {betas: [0.1, 0.2]}\n"
    )
    file.write_text(SMALL + "optim: {lr: 0.5, betas: [0.3, 0.4]}\n")
    options = load_options(above, ["train.workers=0"])
    assert (options.name, options.train.batch_size, options.train.steps) == ("above", 5, 10)
    assert (options.optim.lr, options.optim.betas, options.train.workers) == (0.5, [0.1, 0.2], 0)
    resolved = tmp_path / "resolved.yml"
    resolved.write_text(options_to_yaml(options))
    assert "base" not in resolved.read_text() and load_options(resolved) == options


def test_a_base_need_not_be_a_whole_experiment(tmp_path: Path, file: Path) -> None:
    (tmp_path / "part.yml").write_text("train: {workers: 0}\n")
    file.write_text(SMALL + "base: part.yml\n")
    assert load_options(file).train.workers == 0


@pytest.mark.parametrize(
    ("base", "content", "complaint"),
    [
        ("below.yml", "base: other.yml\n", "has a base itself; only one level is supported"),
        ("small.yml", None, "has a base itself; only one level is supported"),  # a circle
        ("belo.yml", "seed: 1\n", "no such options file; did you mean "),
        ("[below.yml]", "seed: 1\n", "base takes the path of another options file, not ['below"),
        ("", "seed: 1\n", "base takes the path of another options file, not None"),
        ("''", "seed: 1\n", "base takes the path of another options file, not ''"),
        ("below.yml", "a: [\n", "not a readable options file (line "),
        ("below.yml", "- a\n", "an options file is a mapping of names to values"),
        ("below.yml", "sed: 1\n", "unknown key 'sed'; did you mean 'seed'?"),
        ("below.yml", "seed: x\n", "seed: "),
        (".", None, "not a readable options file"),
        ('"a\\0b"', None, "not a readable options file"),
    ],
)
def test_a_base_that_cannot_be_one_is_refused(
    file: Path, base: str, content: str | None, complaint: str
) -> None:
    if content is not None:
        file.with_name("below.yml").write_text(content)
    file.write_text(f"{SMALL}base: {base}\n")
    message = refusal(file)
    assert message.startswith(f"{file}: base ") and complaint in message


def test_a_base_is_named_in_files_alone(file: Path) -> None:
    assert refusal(file, "base=small.yml").startswith("override 'base=small.yml': unknown key ")


# --- Settings made in Python


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        (
            RolloutOptions(solver="eular"),  # type: ignore[arg-type]
            "rollout.solver is 'eular', not one of euler, multistep, consistency; did you mean "
            "'euler'?",
        ),
        (RolloutOptions(steps=0), "rollout.steps must be above 0, but is 0"),
        (RolloutOptions(shift=float("nan")), "rollout.shift must be finite, but is nan"),
        (RolloutOptions(guidance_noise=-1.0), "rollout.guidance_noise must not be negative"),
        (RolloutOptions(guidance_interval=[0.5]), "the lowest and the highest noise level"),
        (RolloutOptions(window=2, sink_frames=2), "must lie below rollout.window=2"),
    ],
)
def test_settings_of_a_rollout_are_checked(settings: RolloutOptions, complaint: str) -> None:
    check_rollout(RolloutOptions(window=2, sink_frames=1))
    with pytest.raises(ScdError) as caught:
        check_rollout(settings)
    assert str(caught.value).startswith("rollout.") and complaint in str(caught.value)


def test_names_of_hashes_stay() -> None:
    """What is hashed under former names is what earlier versions hashed."""
    present = {"flow": {"self_forcing_prob": 0.5}, "rollout": {"spacing": "diffusers", "steps": 2}}
    former = {"flow": {"own_history": 0.5}, "rollout": {"spacing": "reference", "steps": 2}}
    assert with_former_names(present) == former
    assert with_present_names(former, "here") == present
