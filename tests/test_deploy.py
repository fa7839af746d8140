"""The files of deploy/: they parse, and name flags, configs, folders and versions that there are."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from fmbench import entries

REPOSITORY = Path(__file__).parents[1]
DEPLOY = REPOSITORY / "deploy"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
COMMANDS = sorted(path for path in DEPLOY.iterdir() if path.name != "Dockerfile")


@pytest.fixture(scope="module")
def known_flags() -> set[str]:
    """Those of `fmbench train`, without the configs' fields."""
    done = subprocess.run(
        [sys.executable, "-m", "fmbench.main", "--help"], capture_output=True, text=True, cwd=REPOSITORY
    )
    return set(re.findall(r"^  (--\w+)\b", done.stdout, re.MULTILINE))


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.name)
def test_its_commands_are_those_of_fmbench(path, known_flags):
    text = path.read_text()
    if path.suffix == ".yaml":
        yaml.safe_load(text)
    trainings = re.findall(
        r"\btrain (?:[^\n]|\n +-)*", "\n".join(re.sub(r"\\$", "", line) for line in text.splitlines())
    )
    assert trainings
    flags = set(re.findall(r"(?<![\w-])--\w+(?=[= ])(?!\.)", " ".join(trainings)))
    assert "--distributed" in flags
    assert flags <= known_flags | {"--config"}
    for spec in re.findall(r"--config=(?:\$\{CONFIG:-)?([\w:-]+)|CONFIG(?:=|: )([\w:-]+)", text):
        assert "".join(spec) in entries.specs(), spec
    overrides = re.findall(r"--config\.[\w.]+=[\w.]+", text)
    entries.from_arguments([f"--config={entries.names()[0]}", *overrides])


@pytest.mark.parametrize(("name", "pods"), [("jobset", 4), ("kubeflow_trainjob", 4), ("compose", 2)])
def test_as_many_processes_start_as_are_waited_for(name, pods):
    text = (DEPLOY / f"{name}.yaml").read_text()
    content = yaml.safe_load(text)
    if name == "compose":
        services = content["services"].values()
        commands = " ".join(service["command"] for service in services)
        said = re.findall(r"--num_processes=(\d+) --process_id=(\d+)", commands)
        assert said == [(str(pods), str(index)) for index in range(pods)]
        assert all("--coordinator_address=process0:" in service["command"] for service in services)
    elif name == "jobset":
        (job,) = content["spec"]["replicatedJobs"]
        assert {job["template"]["spec"][field] for field in ("parallelism", "completions")} == {pods}
        assert f"--num_processes={pods}" in text
        # As JobSet names the first pod: <set>-<job>-<index of the job>-<of the pod>.<set>
        address = f"{content['metadata']['name']}-{job['name']}-0-0.{content['metadata']['name']}:"
        assert f"--coordinator_address={address}" in text
    else:
        assert content["spec"]["trainer"]["numNodes"] == pods


def test_the_batch_script_is_one():
    for tool in (["bash", "-n"], ["shellcheck", "--shell=bash"]):
        if shutil.which(tool[0]):
            done = subprocess.run([*tool, DEPLOY / "slurm_one_training.sbatch"], capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
    script = (DEPLOY / "slurm_one_training.sbatch").read_text()
    assert "#SBATCH --nodes=4\n" in script
    assert "#SBATCH --signal=TERM@" in script  # to the steps; with B: it would be the shell's, which ignores it


def test_the_images_are_pinned_and_no_root():
    stages = re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE)[1:]
    assert [stage.split()[2] for stage in stages] == ["base", "cuda", "cpu"]  # the last one is the default
    installs = re.findall(r"pip install .*", DOCKERFILE)
    assert len(installs) == 2
    assert all("--constraint constraints.txt" in install for install in installs)
    assert all(stage.rstrip().endswith("USER 1000") for stage in stages[1:])
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    (python,) = re.findall(r"^FROM python:(3\.\d+)-", DOCKERFILE, re.MULTILINE)
    assert f"Programming Language :: Python :: {python}" in project["classifiers"]
    for extra in re.findall(r"\.\[(\w+)\]", DOCKERFILE):
        assert extra in project["optional-dependencies"]
    for sources in re.findall(r"^COPY (.*) \S+$", DOCKERFILE, re.MULTILINE):
        assert all((REPOSITORY / source).exists() for source in sources.split())
