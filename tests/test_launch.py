"""What the scripts hand to accelerate, and what accelerate makes of it; nothing is launched."""

import os
import shutil
import subprocess
from argparse import Namespace
from pathlib import Path

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

from tests.faults.runs import free_port

ROOT = Path(__file__).parent.parent
# In place of the environment's python: it prints what it is told to run.
PYTHON = '#!/bin/sh\n[ "$1" = -c ] && exec echo experiments/x\nprintf "%s\\n" "$@"\nexit 1\n'


@pytest.fixture
def project(tmp_path):
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    program(tmp_path / ".venv/bin/python", PYTHON)
    return tmp_path


def program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def run(project: Path, *command: str, **environment: str) -> list[str]:
    environment = {"NUM_GPUS": "8", **environment}
    return subprocess.run(
        ["bash", *command], cwd=project, env={**os.environ, **environment}, text=True,
        stdout=subprocess.PIPE, check=False, timeout=60,
    ).stdout.splitlines()  # fmt: skip


def as_accelerate_reads(printed: list[str]) -> tuple[Namespace, dict[str, str]]:
    """The launch, and the variables that its processes get."""
    assert printed[:2] == ["-m", "accelerate.commands.launch"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(printed[2:]))
    return arguments, prepare_multi_gpu_env(arguments)


@pytest.mark.parametrize("arguments", [[], ["--dry-run", "options/x.yml"], ["options/x", "a=b"]])
def test_train_sh_needs_an_options_file_first(arguments, project):
    assert run(project, "scripts/train.sh", *arguments) == []  # nothing was launched
    assert run(project, "scripts/train.sh", "options/x.yml")[-3:] == [
        "train",
        "--opt",
        "options/x.yml",
    ]


@pytest.mark.parametrize("processes", [{"NUM_GPUS": "2"}, {"NUM_GPUS": "0", "NUM_PROCS": "2"}])
def test_processes_meet_at_the_port_that_was_asked_for(processes, project):
    for port, given in ((29500, {}), (29611, {"PORT": "29611"})):
        printed = run(project, "scripts/train.sh", "options/x.yml", **processes, **given)
        assert str(port) in " ".join(printed).partition("--module")[0].split()


def test_train_sh_leaves_what_was_chosen_for_the_allocator(project):
    program(project / ".venv/bin/python", '#!/bin/sh\necho "$PYTORCH_ALLOC_CONF"\n')
    one = ["scripts/train.sh", "options/x.yml"]
    assert run(project, *one, NUM_GPUS="1")[-1] == "expandable_segments:True"
    chosen = {"NUM_GPUS": "1", "PYTORCH_ALLOC_CONF": "backend:cudaMallocAsync"}
    assert run(project, *one, **chosen)[-1] == "backend:cudaMallocAsync"


@pytest.mark.parametrize("nodes", [1, 4])
@pytest.mark.parametrize("name", ["ddp", "fsdp2", "fsdp2_wan", "hsdp"])
def test_train_sh_takes_each_configuration(name, nodes, project, monkeypatch):
    monkeypatch.chdir(ROOT)  # where accelerate looks for the file
    printed = run(
        project, "scripts/train.sh", "options/x.yml", "a.b=c",
        ACCELERATE_CONFIG=f"scripts/accelerate/{name}.yaml", NUM_NODES=str(nodes),
        NODE_RANK=str(nodes - 1), MAIN_HOST="10.0.0.1", PORT=str(free_port()),
    )  # fmt: skip
    launch, variables = as_accelerate_reads(printed)
    assert launch.module and launch.training_script == "scd.cli"
    assert launch.training_script_args == ["train", "--opt", "options/x.yml", "a.b=c"]
    assert (launch.num_processes, launch.nproc_per_node) == (8 * nodes, "8")
    assert (launch.num_machines, launch.machine_rank) == (nodes, nodes - 1)
    assert launch.main_process_ip == "10.0.0.1"
    assert variables["ACCELERATE_MIXED_PRECISION"] == "no"  # the options file decides
    assert ("ACCELERATE_USE_FSDP" in variables) == (name != "ddp")
    if name != "ddp":
        assert variables["FSDP_VERSION"] == "2"
        block = "WanBlock" if name == "fsdp2_wan" else "Block"
        assert variables["FSDP_TRANSFORMER_CLS_TO_WRAP"] == block
        assert variables["FSDP_RESHARD_AFTER_FORWARD"] == "true"
    sizes = [variables.get(f"PARALLELISM_CONFIG_DP_{part}_SIZE") for part in ("REPLICATE", "SHARD")]
    assert sizes == ([str(nodes), "8"] if name == "hsdp" else [None, None])


def test_inference_sh_passes_arguments_on_whole(project):
    printed = run(project, "scripts/inference.sh", "ema.safetensors", "a.b=c d", NUM_GPUS="0")
    assert printed[-3:] == ["evaluate", "ema.safetensors", "a.b=c d"]


@pytest.mark.parametrize(
    ("state", "restarts", "again"),
    [
        ("stopped", 0, True),
        ("lost", 3, True),
        ("lost", 10, False),
        ("training", 0, True),  # the main process was lost
        ("failed", 0, False),
        ("finished", 0, False),
        (None, 0, False),  # it did not come so far as to say
    ],
)
def test_slurm_launches_on_every_node_and_queues_what_can_go_on(state, restarts, again, project):
    hosts = '[ "$1" = show ] && exec printf "%s\\n" node-a node-b\necho "$@"\n'
    program(project / "bin/scontrol", f"#!/bin/sh\n{hosts}")
    heartbeat = project / "experiments/x/heartbeat.json"
    heartbeat.parent.mkdir(parents=True)
    heartbeat.write_text('{"state": "stopped"}')  # of an earlier job
    said = "" if state is None else f"""echo '{{"state": "{state}"}}' > {heartbeat}\n"""
    status = int(state not in ("stopped", "finished"))
    said += "echo $SRUN_CPUS_PER_TASK >cores\n"
    srun = f'#!/bin/sh\nshift\n{said}SLURM_NODEID=1 "$@"\nexit {status}\n'
    program(project / "bin/srun", srun)
    printed = run(
        project, "scripts/slurm.sbatch", "options/x.yml", "a.b=c d",
        PATH=f"{project}/bin:{os.environ['PATH']}", SLURM_NNODES="2", SLURM_JOB_ID="7",
        SLURM_JOB_NODELIST="node-[a-b]", SLURM_RESTART_COUNT=str(restarts),
        SLURM_CPUS_PER_TASK="64",
    )  # fmt: skip
    arguments = launch_command_parser().parse_args([a for a in printed[2:] if "requeue" not in a])
    assert (arguments.num_machines, arguments.machine_rank) == (2, 1)
    assert arguments.main_process_ip == "node-a"
    assert arguments.training_script_args == ["train", "--opt", "options/x.yml", "a.b=c d"]
    assert (printed[-1] == "requeue 7") == again
    assert (project / "cores").read_text() == "64\n"  # which srun would not take over by itself


@pytest.mark.parametrize(
    ("gpus", "config", "message"),
    [
        ("0", "scripts/accelerate/ddp.yaml", "ACCELERATE_CONFIG is set, but no GPU is visible"),
        ("2", "nope.yaml", "ACCELERATE_CONFIG=nope.yaml: no such file"),
        ("two", "", "NUM_GPUS=two is not a number of GPUs"),
        ("-1", "", "NUM_GPUS=-1 is not a number of GPUs"),
    ],
)
def test_what_cannot_be_launched_is_one_line(gpus, config, message, project):
    done = subprocess.run(
        ["bash", "scripts/train.sh", "options/x.yml"], cwd=project, capture_output=True, text=True,
        env={**os.environ, "NUM_GPUS": gpus, "ACCELERATE_CONFIG": config},
    )  # fmt: skip
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith(f"error: {message}") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("fails", ["uv", "pip", "nothing"])
def test_an_environment_without_pip_gets_one(tmp_path, fails):
    """As `uv venv` makes it; uv installs, or pip where uv cannot. What is installed is left out.

    Where pip fails too, so does the script, and the environment does not pass for a whole one.
    """
    for name in ("scripts", "pyproject.toml", "constraints.txt"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    log = tmp_path / "log"
    hashes = "*hashlib*) cat >/dev/null; echo 1 ;; *prefix*) echo .venv ;;"
    program(
        tmp_path / ".venv/bin/python",
        f'#!/bin/sh\necho "$2 $3" >>{log}\n[ "$2" = {fails} ] && exit 1\n'
        f'[ "$2 $3" = "pip --version" ] && exit 1\ncase "$2" in {hashes} esac\n',
    )
    done = subprocess.run(
        ["bash", "scripts/setup_env.sh"], cwd=tmp_path, check=False, capture_output=True,
        env={**os.environ, "SCD_VENV": "1"},
    )  # fmt: skip
    packagers = ("pip", "ensurepip", "uv")
    asked = [line for line in log.read_text().splitlines() if line.startswith(packagers)]
    tried = {"uv": ["uv pip", "pip install"], "pip": ["pip install"], "nothing": ["uv pip"]}
    assert asked == ["pip --version", "ensurepip --upgrade", "pip install", *tried[fails]]
    assert (done.returncode != 0) == (fails == "pip")
    assert (tmp_path / ".venv/.scd-installed").exists() == (fails != "pip")
