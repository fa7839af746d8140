"""A run's record: its fields, what is checked of them, and its name."""

import hashlib
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from fmbench import config as config_lib
from fmbench.data import proof

Fraction = Annotated[float, Field(ge=0, le=1)]
# Beyond these limits nothing is measured, and arithmetic overflows.
Number = Annotated[float, Field(ge=-1e30, le=1e30)]
Seconds = Annotated[float, Field(ge=0, le=1e10)]
Count = Annotated[int, Field(ge=0, lt=2**63)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Status = Literal["completed", "interrupted", "diverged"]
Watched = Literal["validation", "test"]
FILE_NAME = r"^_*[A-Za-z0-9][A-Za-z0-9_.=+-]*$"  # what an entry, and so a record, may be called
LONGEST_NAME = 230  # of a file system's 255 bytes, with the endings of a record's files
TARGETS = ("90", "92", "94")  # percent; the keys of time_to_target
MIXED = "-mixed"  # in the name of a record whose processes differ
COMPUTING = ("jax", "jaxlib", "flax", "optax", "onednn-cpu-gomp", "winograd.cpp", "C++ layers", "CUDA", "cuDNN")


class Strict(BaseModel):
    """No unknown fields, no silent conversion, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class Accelerator(Strict):
    """A GPU or TPU at the end of a run, under load a moment before. What nobody tells is None."""

    kind: str  # as JAX calls it, and a slice of a GPU (MIG) always with its profile
    usable_memory_bytes: Count | None = None  # what JAX may allocate
    # As nvidia-smi has it; beside a slice's profile the numbers are the whole GPU's.
    mig_profile: str | None = None  # 1g.10gb
    memory_bytes: Count | None = None
    sm_clock_mhz: Count | None = None
    max_sm_clock_mhz: Count | None = None
    memory_clock_mhz: Count | None = None
    max_memory_clock_mhz: Count | None = None
    power_limit_watts: Number | None = None


class Environment(Strict):
    """Where the numbers come from."""

    device_platform: str  # cpu, gpu, tpu
    device_kind: str  # processor or accelerator model, all of them if they differ
    num_devices: Count
    num_processes: Count  # that train together; the rest of the machine is process 0's
    num_hosts: Count | None = None  # machines that they run on, if they are several
    cpu: str  # the processor as its maker calls it
    cpu_cores: Count  # that the process may run on
    # The rest of the machine; None, where nobody tells and in records from before it was asked.
    machine: str | None = None  # what --machine or FMBENCH_MACHINE calls it
    cpu_stepping: str | None = None  # family, model and stepping: "26.2.1"; many models are called 'AMD EPYC'
    instruction_sets: list[str] | None = None  # those of `machine.INSTRUCTION_SETS` that it has
    shared_by: Annotated[int, Field(ge=2)] | None = None  # runs at a time, each on cores of its own: no timings
    cpu_quota: Number | None = None  # cores' worth of time that a control group allows, if it allows fewer
    memory_bytes: Count | None = None
    virtualised: bool | None = None
    thread_settings: dict[str, str] | None = None  # OMP_NUM_THREADS and its like, and of arithmetic; what is set
    operating_system: str
    python: str
    versions: dict[str, str]  # of packages and, on NVIDIA GPUs, of driver, CUDA and cuDNN
    accelerators: list[Accelerator] | None = None  # of this process, in JAX's order; None on CPUs
    xla_flags: str
    git_commit: str | None
    git_dirty: bool | None  # anything changed outside results/
    git_unknown: str | None = None  # why one of the two is None, in git's words
    code_sha256: str | None = None  # of fmbench's source files and of the modules that the config names

    @property
    def machine_title(self) -> str:
        """All that is known of the processors a run may use: runs share a table only if they share it.

        'AMD EPYC 26.2.1 (2 cores, avx2, avx512f, avx512_bf16, 8 GiB, virtual)'
        """
        parts = [f"{self.cpu_cores} {'core' if self.cpu_cores == 1 else 'cores'}"]
        parts += [f"{self.cpu_quota:g} cores' worth of time"] if self.cpu_quota else []
        parts += self.instruction_sets or []
        parts += [f"{self.memory_bytes / 2**30:.0f} GiB"] if self.memory_bytes else []
        parts += ["virtual"] if self.virtualised else []
        parts += [f"{name}={value}" for name, value in sorted((self.thread_settings or {}).items())]
        name = " ".join(filter(None, [self.cpu, self.cpu_stepping]))
        return f"{f'{self.machine}: ' if self.machine else ''}{name} ({', '.join(parts)})"

    @property
    def machine_slug(self) -> str:
        """The machine in a file name: its given name or processor and cores, and of what else is known a hash."""
        processor = re.sub(r"\((r|tm)\)|\bprocessor\b|\bcpu\b", " ", self.cpu.lower())
        slug = self.machine or f"{_slug(processor)}-{self.cpu_cores}c"
        if re.fullmatch(rf"{re.escape(self.cpu)} \(\d+ cores?\)", self.machine_title):
            return slug  # a record from before more was asked
        return f"{slug}-{hashlib.sha256(self.machine_title.encode()).hexdigest()[:4]}"

    @property
    def conditions(self) -> dict[str, str]:
        """What the processes of one run must share, by name, in words; what is not set or not told is left out."""
        fields = (
            *("code_sha256", "python", "device_platform", "device_kind", "num_devices", "num_processes", "cpu"),
            *("cpu_stepping", "machine", "cpu_cores", "shared_by", "cpu_quota", "virtualised", "xla_flags"),
        )
        found = {field: getattr(self, field) for field in fields}
        found["instruction_sets"] = " ".join(self.instruction_sets or [])
        found["memory"] = f"{self.memory_bytes / 2**30:.0f} GiB" if self.memory_bytes else None
        found |= (self.thread_settings or {}) | self.versions
        return {name: str(value) for name, value in found.items() if value not in (None, "")}

    @property
    def software(self) -> tuple[str, ...]:
        """Versions of what computes, which the runs of a row share: 'jax 0.12.0'."""
        return tuple(f"{name} {self.versions[name]}" for name in COMPUTING if name in self.versions)


class Epoch(Strict):
    """One epoch of the history. `train_*` is the mean over the epoch's steps, dropout and all."""

    epoch: Count  # 1 for the first
    step: Count  # steps done at its end
    learning_rate: Number
    train_loss: Number
    train_accuracy: Fraction
    train_seconds: Seconds  # of this epoch alone
    train_core_seconds: Seconds
    train_images_per_sec: Number
    gap_seconds: Seconds | None = None  # from the last step of the epoch before to the first of this one
    # What else the machine did meanwhile; None in records from before it was asked, and where nobody tells.
    load_average: Seconds | None = None  # of a minute; mean of those at the start and at the end
    other_core_seconds: Seconds | None = None  # that other processes had on the cores this one may run on
    stolen_core_seconds: Seconds | None = None  # that the host of a virtual machine, or a quota, took from it
    involuntary_switches: Count | None = None  # times a thread was ready to go on, and had to wait
    asleep_seconds: Seconds | None = None  # stopped, or the machine asleep; in none of the other seconds
    val_loss: Number | None = None
    val_accuracy: Fraction | None = None
    test_loss: Number | None = None  # only where the config watches the test set
    test_accuracy: Fraction | None = None


class Calibration(Strict):
    """What the machine reaches, by which costs on unlike machines can be compared; see `records.calibration`."""

    matmul_flops_per_sec: dict[str, Annotated[float, Field(gt=0)]]  # by dtype
    memory_bytes_per_sec: Annotated[float, Field(gt=0)]


class Confidence(Strict):
    """What the probabilities of the test images are worth; see `models.confidence`."""

    calibration_error: Fraction  # expected (ECE), of the test set, as the model gives probabilities
    temperature: Annotated[float, Field(gt=0, le=100)] | None  # fitted on validation; None where there is none
    calibration_error_at_temperature: Fraction | None  # likewise


class StageResult(Strict):
    """A stage of the run, and the state at its end."""

    name: str
    num_epochs: Count  # done
    learning_rate: Number  # peak
    augment: dict[str, Number | str]  # strengths and the function's import path, as the config has them
    train_seconds: Seconds
    train_core_seconds: Seconds
    val_accuracy: Fraction | None
    test_accuracy: Fraction


class Process(Strict):
    """One of the processes that made a run, also if it was killed."""

    began: str  # UTC, ISO 8601
    ended: Literal["completed", "interrupted", "diverged", "failed", "killed"] | None = None  # None: not yet
    # The steps that it did of those that led to the run's last state: none, if they are equal.
    first_step: Count = 0
    last_step: Count = 0
    wall_seconds: Seconds = 0.0  # but for those asleep; of one that was killed to within a second
    asleep_seconds: Seconds = 0.0
    git_commit: str | None = None
    git_dirty: bool | None = None
    git_unknown: str | None = None
    conditions: dict[str, str]  # as `Environment.conditions`


class RunRecord(Strict):
    """A run's record; keys are the field's terms, seconds are wall seconds, fractions lie in [0, 1]."""

    schema_version: Literal[1, 2]  # 2 has the machine in its file's name
    status: Status
    created: str  # UTC, ISO 8601
    entry: Annotated[str, Field(pattern=FILE_NAME)]  # names the file
    config_file: str
    config: dict[str, Any]
    seed: Count
    dtype: str
    parallel: str
    trained_with: Count = 0  # other seeds in the same program: the times are those of all together
    steps_per_call: Count
    batch_size: Count

    model: str
    num_params: Count  # with the batch norms' running statistics, as Keras counts
    num_trainable_params: Count
    flops_per_image: Number  # of a training step

    data_version: str
    data_sha256: dict[str, Sha256]
    num_train: Count
    num_validation: Count
    num_test: Count
    watched: Watched | None  # split evaluated after each epoch

    num_epochs: Count  # done
    num_steps: Count  # done
    num_resumes: Count  # processes after the first, also those that were killed
    train_loss: Number | None
    train_accuracy: Fraction | None
    val_loss: Number | None
    val_accuracy: Fraction | None
    test_loss: Number | None
    test_accuracy: Fraction | None
    test_top5_accuracy: Fraction | None
    test_per_class_accuracy: list[Fraction] | None
    predictions_sha256: str | None  # of the bytes of the predicted classes, uint8, in idx order

    # From the start of the process, the last one if there were several, to the end of its first step; None for a
    # run that was not the process's first.
    first_step_seconds: Seconds | None = None
    setup_seconds: Seconds  # data, model, restore
    compile_seconds: Seconds
    compile_cached: bool  # programs came from the persistent cache
    train_seconds: Seconds
    eval_seconds: Seconds
    checkpoint_seconds: Seconds
    train_core_seconds: Seconds
    eval_core_seconds: Seconds
    wall_seconds: Seconds  # of all processes, also those that were killed, but for the time asleep
    train_images_per_sec: Number | None  # steady state: median over epochs
    eval_images_per_sec: Number | None
    step_time_ms: Number | None  # steady state
    train_share: Fraction | None = None  # of the wall time, in training steps
    peak_memory_bytes: Count
    time_to_target: dict[str, Seconds | None]  # "94" -> train seconds to 94 % on the watched split

    history: list[Epoch]
    stages: list[StageResult] = []  # those that were finished
    calibration: Calibration | None = None  # None in records from before and where it was not measured
    environment: Environment  # of the last process
    processes: list[Process] = []  # in their order; none in records from before they were listed
    confidence: Confidence | None = None  # None in records from before it was measured
    val_predictions_sha256: str | None = None  # of a fold, in the order of its rows

    @field_validator("time_to_target")
    @classmethod
    def _has_all_targets(cls, seconds: dict[str, Seconds | None]) -> dict[str, Seconds | None]:
        if set(seconds) != set(TARGETS):
            raise ValueError(f"the targets are {', '.join(TARGETS)}")
        return seconds

    @field_validator("data_sha256")
    @classmethod
    def _has_that_of_the_labels(cls, sha256: dict[str, str]) -> dict[str, str]:
        if "t10k-labels" not in sha256:
            raise ValueError("t10k-labels is missing")
        return sha256

    @model_validator(mode="after")
    def _completed_means_tested(self) -> "RunRecord":
        if self.status == "completed":
            for field in ("test_accuracy", "test_per_class_accuracy", "predictions_sha256"):
                if getattr(self, field) is None:
                    raise ValueError(f"{field} is missing from a completed run")
        return self

    @model_validator(mode="after")
    def _agrees_with_its_config(self) -> "RunRecord":
        for field in ("entry", "config_file", "seed", "dtype", "parallel", "batch_size"):
            if self.config.get(field) != getattr(self, field):
                raise ValueError(f"{field} is {getattr(self, field)}, but config.{field} {self.config.get(field)}")
        config_lib.check_fields(self.config)
        if self.num_epochs > self.config.get("num_epochs", 0):
            raise ValueError(f"num_epochs is {self.num_epochs}, more than config.num_epochs")
        return self

    @model_validator(mode="after")
    def _has_a_file_name(self) -> "RunRecord":
        if not re.fullmatch(FILE_NAME, self.name) or len(self.name) > LONGEST_NAME:
            raise ValueError(f"entry, device, dtype and data_version make {self.name!r:.60}, which names no file")
        return self

    @property
    def mixture(self) -> str:
        """In what the processes that made it differ, so that it is no single machine's; '' if in nothing."""
        return unlike(self.processes)

    @property
    def name(self) -> str:
        """File name without ending; a run on old or other data never takes that of one on the standard data."""
        name = record_name(self.entry, self.environment, self.dtype, self.seed)
        name += f"-with{self.trained_with}" if self.trained_with else ""
        name += MIXED if self.mixture else ""
        has_suffix = self.data_version == proof.OLD or proof.is_unproven(self.data_version)
        return f"{name}-{self.data_version}" if has_suffix else name


def unlike(processes: Sequence[Process]) -> str:
    """In what those differ that a run's last state, or its evaluation, comes from: 'cpu_cores: 2 -> 1', or ''.

    Commits may differ, for results are committed, too: the hash of the code tells.
    """
    made = [process.conditions for process in processes if process.last_step > process.first_step]
    made += [process.conditions for process in processes[-1:]]
    parts = []
    for name in sorted({name for conditions in made for name in conditions}):
        values = [conditions.get(name, "none") for conditions in made]
        if len(set(values)) > 1:
            parts.append(f"{name}: {' -> '.join(dict.fromkeys(values))}")
    return ", ".join(parts)


def what_differs(runs: Sequence[RunRecord]) -> str:
    """What the runs of one row do not share of code and libraries: 'commits 1ee253f, 755e268; numpy 2.4, 2.5'."""
    commits = {commit[:7] if (commit := run.environment.git_commit) else "not known" for run in runs}
    parts = [f"commits {', '.join(sorted(commits))}"] if len(commits) > 1 else []
    for name in sorted({name for run in runs for name in run.environment.versions}):
        versions = {run.environment.versions.get(name, "none") for run in runs}
        parts += [f"{name} {', '.join(sorted(versions))}"] if len(versions) > 1 else []
    return "; ".join(parts)


def record_name(entry: str, environment: Environment, dtype: str, seed: int) -> str:
    """<entry>-<device>-<dtype>-seed<k>, with the numbers of devices, processes and runs at a time, if several.

    CPUs are told apart by machine: 'mlp-cpu-amd-epyc-2c-0d2f-float32-seed0'.
    """
    name = f"-{environment.machine_slug}" if environment.device_platform == "cpu" else ""
    return f"{entry}-{_device(environment, name)}-{dtype}-seed{seed}"


def workdir_name(entry: str, environment: Environment, dtype: str, seed: int) -> str:
    """A record's name without the machine, whose own a work directory is: 'mlp-cpu-float32-seed0'."""
    return f"{entry}-{_device(environment)}-{dtype}-seed{seed}"


def _device(environment: Environment, name: str = "") -> str:
    device = "cpu" if environment.device_platform == "cpu" else _slug(environment.device_kind)
    devices = f"-x{environment.num_devices}" if environment.num_devices > 1 else ""
    processes = f"-p{environment.num_processes}" if environment.num_processes > 1 else ""
    return f"{device}{name}{devices}{processes}" + (
        f"-shared{environment.shared_by}" if environment.shared_by else ""
    )


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def predictions_sha256(predictions: np.ndarray) -> str:
    """The hash that ties a record to its predictions, (n,) uint8."""
    return hashlib.sha256(predictions.astype(np.uint8).tobytes()).hexdigest()
