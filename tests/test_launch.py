"""Launch files: scripts, printed commands, a SLURM job that is requeued, Kubernetes schemas."""

import copy
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import jsonschema
import pytest
import yaml
from conftest import free_port

from beagle_jax.config import load_config

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(
    [*(ROOT / "launch").glob("*.sh"), ROOT / "launch" / "slurm.sbatch", ROOT / ".ci" / "run"]
)
JOBSETS = sorted((ROOT / "launch").glob("gke_*.yaml"))
SCHEMA = yaml.safe_load((ROOT / "tests" / "jobset.schema.yaml").read_text())
COMMAND = ["train", "--config", "configs/quickstart.yaml", "train.seed=1"]
PYTHON_M = "-m beagle_jax.train --config configs/quickstart.yaml train.seed=1"


def bash(
    script: str, *arguments: str, cwd: Path = ROOT, **environment: str
) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", f"launch/{script}", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=cwd,
        env={**os.environ, **environment},
    )


def shellcheck(path: Path) -> str:
    program = Path(sys.executable).parent / "shellcheck"
    if not program.exists():
        pytest.skip("shellcheck is not installed; the test extra brings it")
    return subprocess.run(
        [program, "--external-sources", path], capture_output=True, text=True, cwd=ROOT
    ).stdout


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_clean(path):
    assert shellcheck(path) == ""


def test_shellcheck_sees_a_missing_quote(tmp_path):
    (tmp_path / "x.sh").write_text("#!/usr/bin/env bash\nrm $1\n")
    assert "SC2086" in shellcheck(tmp_path / "x.sh")


@pytest.mark.parametrize(
    ("script", "arguments", "expected"),
    [
        (
            "local_cpu.sh",
            COMMAND,
            f"env JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=8 .venv/bin/python {PYTHON_M}",
        ),
        ("gpu.sh", COMMAND, f"env JAX_PLATFORMS=cuda\\,cpu .venv-gpu/bin/python {PYTHON_M}"),
        ("gpu.sh", ["--gpus", "2", *COMMAND], "CUDA_VISIBLE_DEVICES=0\\,1 .venv-gpu/bin/python"),
        (
            "slurm.sbatch",
            COMMAND,
            "srun --kill-on-bad-exit=1 env JAX_PLATFORMS=cuda\\,cpu .venv-gpu/bin/python "
            f"{PYTHON_M}",
        ),
        (
            "tpu_pod.sh",
            ["--here", *COMMAND],
            f"env JAX_PLATFORMS=tpu\\,cpu .venv-tpu/bin/python {PYTHON_M}",
        ),
        (
            "quickstart.sh",
            ["--short", "eval.limit=1"],
            "beagle_jax.evaluate --config configs/quickstart.yaml data.answer_tokens=2000",
        ),
        (
            "make_it_yours.sh",
            ["mine.jsonl", "train.seed=1"],
            "beagle_jax.evaluate --config configs/make_it_yours.yaml "
            "eval.suites=\\[runs/make_it_yours/held_out.jsonl\\] train.seed=1",
        ),
        (
            "one_gpu.sh",
            ["--seconds", "60", "train.seed=1"],
            ".venv-gpu/bin/python -m benchmarks.one_gpu --seconds 60 train.seed=1",
        ),
        (
            "one_gpu.sh",
            ["--config", "x.yaml", "--toy"],
            ".venv/bin/python -m benchmarks.one_gpu --config x.yaml --toy",
        ),
        (
            "test.sh",
            ["-k", "late"],
            "-m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder -k late",
        ),
    ],
)
def test_a_dry_run_prints_the_commands_and_does_nothing(script, arguments, expected):
    before = sorted(os.listdir(ROOT))
    done = bash(script, "--dry-run", *arguments)
    assert done.returncode == 0 and expected in done.stdout and "-m pip install" in done.stdout
    assert done.stderr == "" and sorted(os.listdir(ROOT)) == before


def test_a_pod_runs_on_every_worker_what_was_asked_for():
    lines = bash(
        "tpu_pod.sh", "--dry-run", "pod-1", "us-west4-a", *COMMAND, "data.source=a b"
    ).stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["git", "gcloud", "gcloud", "rm"]
    assert all("--zone=us-west4-a --worker=all" in line for line in lines[1:3])
    # What the workers' shell would do, with `bash` seen through to the script's own dry run.
    remote = subprocess.run(
        ["bash", "-c", f"printf '%s' {lines[2].split('--command=')[1]}"],
        capture_output=True,
        text=True,
    ).stdout
    script = remote.split("&& bash ")[1].replace("--here", "--dry-run --here")
    printed = subprocess.run(
        ["bash", "-c", f"bash {script}"], capture_output=True, text=True, cwd=ROOT
    ).stdout
    expected = PYTHON_M.replace("train --", "train --distributed --")
    assert f".venv-tpu/bin/python {expected} data.source=a\\ b" in printed


def test_a_pod_s_workers_use_the_python_that_was_named():
    lines = bash(
        "tpu_pod.sh", "--dry-run", "pod-1", "us-west4-a", *COMMAND, PYTHON="python3.12"
    ).stdout.splitlines()
    command = shlex.split(lines[2])[-1]
    assert "cd beagle_jax && env PYTHON=python3.12 bash launch/tpu_pod.sh --here train" in command


def test_a_pod_gets_what_is_committed_and_the_rest_is_named(tmp_path):
    shutil.copytree(ROOT / "launch", tmp_path / "launch")

    def git(*words):
        return subprocess.run(
            ["git", "-c", "user.name=a", "-c", "user.email=a@b", *words],
            cwd=tmp_path,
            check=True,
            capture_output=True,
        )

    def dry_run():
        return bash("tpu_pod.sh", "--dry-run", "pod-1", "us-west4-a", *COMMAND, cwd=tmp_path).stderr

    git("init")
    assert "changes that are not committed are not copied" in dry_run()
    git("add", ".")
    git("commit", "--message", "all")
    assert dry_run() == ""


@pytest.mark.parametrize(
    ("script", "arguments", "expected"),
    [
        ("local_cpu.sh", [], "which command? bash launch/local_cpu.sh train --config"),
        ("gpu.sh", ["--gpus", "9", "train"], "--gpus is 9; expected 1 to 8"),
        ("gpu.sh", ["--gpus"], "--gpus is missing; expected 1 to 8"),
        ("make_it_yours.sh", [], "which prompts? bash launch/make_it_yours.sh PROMPTS.jsonl"),
        ("make_it_yours.sh", ["x.txt"], "which prompts? bash launch/make_it_yours.sh PROMPTS"),
        ("one_gpu.sh", ["--python"], "--python is missing its interpreter"),
        ("slurm.sbatch", [], "which command? sbatch launch/slurm.sbatch train"),
        ("tpu_pod.sh", ["pod-1"], "expected NAME ZONE COMMAND"),
    ],
)
def test_usage(script, arguments, expected):
    done = bash(script, "--dry-run", *arguments)
    assert done.returncode == 2 and f"error: {expected}" in done.stderr and done.stdout == ""


@pytest.fixture
def cluster(tmp_path) -> Path:
    """A clone with an installed environment, and programs that record their calls as SLURM."""
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    for name in ("requirements.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    programs = {
        "srun": 'exec "${@:2}"',
        "scancel": 'kill -TERM "$(cat tasks)"',
        "scontrol": ":",
        # The training: stays until SIGTERM, saves, and leaves with status 0.
        "../.venv-gpu/bin/python": 'trap "echo saved >> calls; exit 0" TERM; echo $$ > tasks; '
        "while :; do sleep 0.05; done",
    }
    for name, body in programs.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'#!/usr/bin/env bash\necho "{path.name} $*" >> calls\n{body}\n')
        path.chmod(0o755)
    stamp = subprocess.run(
        "cat requirements.txt pyproject.toml | cksum",
        shell=True,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    (tmp_path / ".venv-gpu" / "installed").write_text(stamp.stdout)
    return tmp_path


def submitted(folder: Path) -> subprocess.Popen:
    environment = {
        "PATH": f"{folder}/bin:{os.environ['PATH']}",
        "SLURM_JOB_ID": "7",
        "SLURM_SUBMIT_DIR": str(folder),
    }
    return subprocess.Popen(
        ["bash", "launch/slurm.sbatch", *COMMAND], cwd=folder, env={**os.environ, **environment}
    )


def waited_for(path: Path) -> str:
    deadline = time.monotonic() + 30
    while not (path.exists() and path.read_text().strip()):
        assert time.monotonic() < deadline, f"{path.name} never came"
        time.sleep(0.02)
    return path.read_text().strip()


def test_a_slurm_job_at_its_time_limit_saves_and_is_queued_again(cluster):
    job = submitted(cluster)
    waited_for(cluster / "tasks")
    job.send_signal(signal.SIGUSR1)  # as --signal=B:USR1@300 does
    assert job.wait(30) == 0
    calls = (cluster / "calls").read_text().splitlines()
    assert (
        calls[0]
        == f"srun --kill-on-bad-exit=1 env JAX_PLATFORMS=cuda,cpu .venv-gpu/bin/python {PYTHON_M}"
        and calls[1] == f"python {PYTHON_M}"
    )
    assert calls[2:] == ["scancel --signal=TERM 7", "saved", "scontrol requeue 7"]


def test_a_slurm_job_that_fails_is_not_queued_again(cluster):
    job = submitted(cluster)
    os.kill(int(waited_for(cluster / "tasks")), signal.SIGKILL)
    assert job.wait(30) == 128 + signal.SIGKILL
    assert "scontrol" not in (cluster / "calls").read_text()


def test_sbatch_reads_its_options():
    """SLURM stops reading options at the first line that is neither a comment nor empty."""
    lines = (ROOT / "launch" / "slurm.sbatch").read_text().splitlines()
    head = lines[
        : next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    ]
    options = dict(
        line.removeprefix("#SBATCH --").split("=")
        for line in head
        if line.startswith("#SBATCH --") and "=" in line
    )
    # One task a GPU, each sees all of its host.
    assert options["ntasks-per-node"] == options["gpus-per-node"] == "8"
    assert "#SBATCH --requeue" in head and options["signal"] == "B:USR1@300"


def jobset(path: Path) -> dict:
    return next(
        manifest
        for manifest in yaml.safe_load_all(path.read_text())
        if manifest["kind"] == "JobSet"
    )


@pytest.mark.parametrize("path", JOBSETS, ids=lambda path: path.name)
def test_jobsets_follow_the_schema_and_restart(path):
    made = jobset(path)
    jsonschema.Draft202012Validator(SCHEMA).validate(made)
    [workers] = made["spec"]["replicatedJobs"]
    job = workers["template"]["spec"]
    assert (
        made["spec"]["network"]["enableDNSHostnames"]
        and made["spec"]["failurePolicy"]["maxRestarts"] > 0
    )
    assert job["completionMode"] == "Indexed" and job["parallelism"] == job["completions"] > 1
    assert job["template"]["spec"]["restartPolicy"] == "Never" and job["backoffLimit"] == 0


@pytest.mark.parametrize("path", JOBSETS, ids=lambda path: path.name)
def test_jobsets_ask_for_a_run_that_exists(path):
    [workers] = jobset(path)["spec"]["replicatedJobs"]
    pod = workers["template"]["spec"]["template"]["spec"]
    [container] = pod["containers"]
    module, *arguments = container["args"]
    option, config, *overrides = [argument for argument in arguments if argument != "--distributed"]
    assert (module, option) == ("beagle_jax.train", "--config")
    shared = container["volumeMounts"][0]["mountPath"]
    loaded = load_config(ROOT / config, overrides)
    assert all(
        folder.startswith(shared)
        for folder in (loaded.train.folder, loaded.data.folder, loaded.target.cache_dir)
    )
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        volume["name"] for volume in pod["volumes"]
    }


@pytest.mark.parametrize(
    "break_it",
    [
        lambda made: made["spec"]["replicatedJobs"][0]["template"]["spec"].update(paralelism=4),
        lambda made: made["spec"]["network"].update(enableDNSHostnames="yes"),
        lambda made: made["spec"]["replicatedJobs"][0]["template"]["spec"]["template"][
            "spec"
        ].update(restartPolicy="Always"),
        lambda made: made.update(apiVersion="batch/v1"),
    ],
)
def test_the_schema_sees_mistakes(break_it):
    made = copy.deepcopy(jobset(JOBSETS[0]))
    break_it(made)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(SCHEMA).validate(made)


def test_a_tpu_slice_has_a_host_for_every_four_chips():
    [workers] = jobset(ROOT / "launch" / "gke_jobset.yaml")["spec"]["replicatedJobs"]
    job = workers["template"]["spec"]
    pod = job["template"]["spec"]
    rows, columns = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    chips = pod["containers"][0]["resources"]["limits"]["google.com/tpu"]
    assert job["parallelism"] * chips == rows * columns


JOIN = """
from argparse import Namespace
{before}
from beagle_jax.processes import join
join(Namespace(distributed={flag}, quiet=False, json=None))
import jax
print(jax.process_index(), jax.process_count(), jax.device_count())
"""
# A worker of a pod slice without its chips: what JAX asks before it reads the variables that GKE
# sets.
ON_A_TPU_VM = (
    "from jax._src.clusters import cloud_tpu_cluster, "
    "cluster\ncloud_tpu_cluster.running_in_cloud_tpu_vm = cluster.running_in_cloud_tpu_vm = "
    "True"
)


def joined(processes: list[dict[str, str]], before: str = "", flag: bool = False) -> list[str]:
    """Returns what each of these processes knows of the others when they start together."""
    clean = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("SLURM_", "JAX_", "TPU_"))
    }
    clean |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4", "PYTHONPATH": str(ROOT)}
    code = JOIN.format(before=before, flag=flag)
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=clean | more,
        )
        for more in processes
    ]
    ended = [process.communicate(timeout=120) for process in started]
    assert [process.returncode for process in started] == [0] * len(started), ended
    return [out.strip() for out, _ in ended]


def test_tasks_of_srun_find_each_other():
    port = str(free_port())
    task = {
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "JAX_COORDINATOR_PORT": port,
    }
    assert joined(
        [task | {"SLURM_PROCID": number, "SLURM_LOCALID": number} for number in "01"]
    ) == ["0 2 8", "1 2 8"]


def test_pods_of_the_gpu_jobset_find_each_other():
    [workers] = jobset(ROOT / "launch" / "gke_jobset_gpu.yaml")["spec"]["replicatedJobs"]
    job = workers["template"]["spec"]
    [container] = job["template"]["spec"]["containers"]
    variables = {
        variable["name"]: variable.get("value")
        for variable in container["env"]
        if variable["name"].startswith("JAX_")
    }
    assert variables.pop("JAX_PLATFORMS") == "cuda,cpu" and variables.pop(
        "JAX_COMPILATION_CACHE_DIR"
    )
    assert variables.pop("JAX_PROCESS_ID") is None  # the pod's own number
    host, port = variables.pop("JAX_COORDINATOR_ADDRESS").split(":")
    assert host == f"beagle-{workers['name']}-0-0.beagle" and container["ports"] == [
        {"containerPort": int(port)}
    ]
    assert variables == {"JAX_NUM_PROCESSES": str(job["parallelism"])}
    address = {"JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}"}
    assert joined([variables | address | {"JAX_PROCESS_ID": number} for number in "01"]) == [
        "0 2 8",
        "1 2 8",
    ]


def test_workers_of_a_tpu_slice_find_each_other():
    port = str(free_port())
    worker = {
        "TPU_WORKER_HOSTNAMES": "localhost,localhost",
        "TPU_SKIP_MDS_QUERY": "1",
        "JAX_COORDINATOR_PORT": port,
        "MEGASCALE_COORDINATOR_ADDRESS": "localhost",
        "MEGASCALE_NUM_SLICES": "1",
        "MEGASCALE_SLICE_ID": "0",
    }
    joined_as = joined(
        [worker | {"TPU_WORKER_ID": number} for number in "01"], before=ON_A_TPU_VM, flag=True
    )
    assert joined_as == ["0 2 8", "1 2 8"]


def test_the_image_copies_what_exists_and_installs_extras_that_exist():
    lines = (ROOT / "launch" / "Dockerfile").read_text().splitlines()
    steps = [line.split() for line in lines if line and not line.startswith("#")]
    assert steps[0][0] == "FROM" and {step[0] for step in steps} <= {
        "FROM",
        "ARG",
        "WORKDIR",
        "COPY",
        "RUN",
        "ENV",
        "ENTRYPOINT",
        "CMD",
    }
    copied = [name for step in steps if step[0] == "COPY" for name in step[1:-1]]
    assert copied and all((ROOT / name).exists() for name in copied)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    [extras] = [step[1].partition("=")[2].split(",") for step in steps if step[0] == "ARG"]
    assert set(extras) <= set(project["project"]["optional-dependencies"])
    # What the install reads must be there before it runs.
    installs = next(number for number, step in enumerate(steps) if step[0] == "RUN")
    before = {name for step in steps[:installs] if step[0] == "COPY" for name in step[1:-1]}
    named = {
        project["project"]["readme"],
        project["project"]["license"]["file"],
        *project["tool"]["setuptools"]["dynamic"]["dependencies"]["file"],
        *project["tool"]["setuptools"]["package-dir"].values(),  # configs and drafts
    }
    assert before == set(copied) == {"pyproject.toml", "beagle_jax", *named}
    assert {"configs", "drafts"} <= named
