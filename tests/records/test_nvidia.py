"""What a record says of accelerators, with a stand-in for nvidia-smi and for JAX's devices."""

import json
import os
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from fmbench.layers import onednn
from fmbench.records import machine, nvidia, schema

H100, H200, A100, V100 = (
    "NVIDIA H100 80GB HBM3",
    "NVIDIA H200",
    "NVIDIA A100-SXM4-40GB",
    "Tesla V100-SXM2-16GB",
)
ONE_H100 = "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-11111111-2222-3333-4444-555555555555)\n"
ONE_H200 = "GPU 0: NVIDIA H200 (UUID: GPU-21111111-2222-3333-4444-555555555555)\n"
A100_IN_SLICES = """\
GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-e86cb44c-6756-fd30-cd4a-1e6da3caf9b0)
  MIG 3g.20gb     Device  0: (UUID: MIG-c7384736-a75d-5afc-978f-d2f1294409fd)
  MIG 1g.5gb      Device  1: (UUID: MIG-a28ad590-3fda-56dd-84fc-0a0b96edc58d)
GPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-f86cb44c-6756-fd30-cd4a-1e6da3caf9b0)
"""
TWO_KINDS = """\
GPU 0: Tesla V100-SXM2-16GB (UUID: GPU-0a000000-6756-fd30-cd4a-1e6da3caf9b0)
GPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-0b000000-6756-fd30-cd4a-1e6da3caf9b0)
"""
ROW_H100 = "0, 580.65.06, 81559, 1980, 1980, 2619, 2619, 700.00\n"
ROW_H200 = "0, 570.124.06, 143771, 1965, 1980, 3201, 3201, 700.00\n"
ROWS_A100 = (
    "0, 535.54.03, 40960, 1275, 1410, 1215, 1215, 400.00\n1, 535.54.03, 40960, 210, 1410, 1215, 1215, 300.00\n"
)
ROWS_TWO_KINDS = (
    "0, 535.54.03, 16384, 1530, 1530, 877, 877, 300.00\n1, 535.54.03, 40960, 1275, 1410, 1215, 1215, 400.00\n"
)
ROW_UNREADABLE = (
    "0, 525.60.13, 81559, [N/A], [Not Supported], [Unknown Error], [N/A], [Insufficient Permissions]\n"
)


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """Puts a program of this name on the PATH, which answers as it is told; and counts its calls."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    nvidia._list_gpus.cache_clear()

    def install(listed: str = "", rows: str = "", *, script: str | None = None) -> Path:
        (tmp_path / "listed").write_text(listed)
        (tmp_path / "rows").write_text(rows)
        wanted = f"--query-gpu={','.join(nvidia.FIELDS)} --format=csv,noheader,nounits"
        body = f"""#!/bin/sh
echo "$*" >>{tmp_path}/calls
case "$*" in
  -L) cat {tmp_path}/listed ;;
  "{wanted}") cat {tmp_path}/rows ;;
  *) exit 2 ;;
esac
"""
        (folder / "nvidia-smi").write_text(script or body)
        (folder / "nvidia-smi").chmod(0o755)
        return tmp_path / "calls"

    yield install
    nvidia._list_gpus.cache_clear()


@pytest.fixture
def devices(monkeypatch):
    """Makes JAX have these devices."""

    def pretend(*kinds: str, platform: str = "gpu", version: str = "PJRT C API\ncuda 13000") -> None:
        devices = [
            SimpleNamespace(
                device_kind=kind,
                platform=platform,
                memory_stats=lambda: {"bytes_limit": 60 << 30},
                client=SimpleNamespace(platform_version=version),
            )
            for kind in kinds
        ]
        monkeypatch.setattr(jax, "devices", lambda: devices)
        monkeypatch.setattr(jax, "local_devices", lambda: devices)
        monkeypatch.setattr(jax, "device_count", lambda: len(devices))
        monkeypatch.setattr(jax, "default_backend", lambda: platform)

    return pretend


@pytest.mark.parametrize(
    ("kind", "listed", "row", "driver", "memory", "clocks"),
    [
        (H100, ONE_H100, ROW_H100, "580.65.06", 81559, (1980, 1980, 2619, 2619)),
        (H200, ONE_H200, ROW_H200, "570.124.06", 143771, (1965, 1980, 3201, 3201)),
    ],
)
def test_a_gpu(nvidia_smi, devices, kind, listed, row, driver, memory, clocks):
    nvidia_smi(listed, row)
    devices(kind)
    environment = machine.environment()
    assert (environment.device_platform, environment.device_kind) == ("gpu", kind)
    assert environment.versions["NVIDIA driver"] == driver
    assert environment.versions["CUDA"] == "13.0"
    assert onednn.PACKAGE not in environment.versions
    assert environment.accelerators == [
        schema.Accelerator(
            kind=kind,
            usable_memory_bytes=60 << 30,
            memory_bytes=memory << 20,
            sm_clock_mhz=clocks[0],
            max_sm_clock_mhz=clocks[1],
            memory_clock_mhz=clocks[2],
            max_memory_clock_mhz=clocks[3],
            power_limit_watts=700.0,
        )
    ]
    assert schema.Environment.model_validate_json(environment.model_dump_json()) == environment


@pytest.mark.parametrize("named_by_cuda", [True, False])
@pytest.mark.parametrize(
    ("visible", "profile"),
    [
        ("MIG-a28ad590-3fda-56dd-84fc-0a0b96edc58d", "1g.5gb"),
        ("MIG-c7384736", "3g.20gb"),
        ("0", "3g.20gb"),  # CUDA takes the first slice
        ("GPU-e86c", "3g.20gb"),
        (None, "3g.20gb"),
        ("1", None),
        ("GPU-f86c", None),
    ],
)
def test_a_slice_has_its_profile_in_kind_and_name(
    nvidia_smi, devices, monkeypatch, visible, profile, named_by_cuda
):
    nvidia_smi(A100_IN_SLICES, ROWS_A100)
    kind = f"{A100} MIG {profile}" if profile else A100
    devices(kind if named_by_cuda else A100)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    elif not named_by_cuda:
        kind, profile = A100, None  # it may be the whole one
    environment = machine.environment()
    (accelerator,) = environment.accelerators or []
    assert (environment.device_kind, accelerator.kind, accelerator.mig_profile) == (kind, kind, profile)
    assert accelerator.power_limit_watts == (400.0 if profile else 300.0)
    assert machine.environment(ask_driver=False).device_kind == kind
    name = schema.record_name("mlp", environment, "float32", 0)
    slug = "-mig-" + profile.replace(".", "-") if profile else ""
    assert name == f"mlp-nvidia-a100-sxm4-40gb{slug}-float32-seed0"


def test_several_gpus_of_two_kinds_are_named_each(nvidia_smi, devices):
    nvidia_smi(TWO_KINDS, ROWS_TWO_KINDS)
    devices(A100, V100)  # the fastest first, as CUDA has it
    environment = machine.environment()
    assert environment.device_kind == f"{A100} and {V100}"
    assert [(a.kind, a.memory_bytes) for a in environment.accelerators or []] == [
        (A100, 40960 << 20),
        (V100, 16384 << 20),
    ]
    assert machine.describe_devices() == f"1 x {A100} and 1 x {V100}"
    devices(A100, A100)
    assert machine.describe_devices() == f"2 x {A100}"


def test_what_cannot_be_read_is_none(nvidia_smi, devices):
    nvidia_smi(ONE_H100, ROW_UNREADABLE)
    devices(H100)
    environment = machine.environment()
    (accelerator,) = environment.accelerators or []
    assert accelerator == schema.Accelerator(kind=H100, usable_memory_bytes=60 << 30, memory_bytes=81559 << 20)
    assert environment.versions["NVIDIA driver"] == "525.60.13"


@pytest.mark.parametrize(
    "script",
    [
        None,
        "#!/bin/sh\necho 'NVIDIA-SMI has failed because it could not communicate with the driver.'; exit 9\n",
        "#!/bin/sh\necho 'Field \"power.limit\" is not a valid field to query.'; exit 2\n",
        "#!/bin/sh\nprintf '\\377\\376'\n",
        "#!/bin/sh\nexec sleep 60\n",
    ],
    ids=["absent", "no driver", "unknown field", "not text", "hangs"],
)
def test_without_nvidia_smi_the_rest_is_recorded(nvidia_smi, devices, monkeypatch, tmp_path, script):
    monkeypatch.setattr(nvidia, "TIMEOUT", 0.3)
    if script:
        nvidia_smi(script=script)
    else:
        monkeypatch.setenv("PATH", str(tmp_path))
    devices(H100)
    start = time.perf_counter()
    environment = machine.environment()
    assert time.perf_counter() - start < 20
    assert environment.accelerators == [schema.Accelerator(kind=H100, usable_memory_bytes=60 << 30)]
    assert "NVIDIA driver" not in environment.versions


def test_the_driver_is_asked_for_clocks_only_where_they_are_wanted(nvidia_smi, devices):
    calls = nvidia_smi(ONE_H100, ROW_H100)
    devices(H100)
    assert machine.environment(ask_driver=False).accelerators is None
    assert calls.read_text() == "-L\n"
    machine.environment()
    assert len(calls.read_text().splitlines()) == 2


def test_a_tpu_asks_no_nvidia_driver(nvidia_smi, devices):
    calls = nvidia_smi(ONE_H100, ROW_H100)
    devices("TPU v5 lite", "TPU v5 lite", platform="tpu", version="PJRT C API\nTFRT TPU v5 lite")
    environment = machine.environment()
    assert environment.accelerators == 2 * [schema.Accelerator(kind="TPU v5 lite", usable_memory_bytes=60 << 30)]
    assert "CUDA" not in environment.versions
    assert not calls.exists()


def test_on_cpus_there_are_no_accelerators_and_old_records_say_nothing_of_them(nvidia_smi):
    calls = nvidia_smi(ONE_H100, ROW_H100)
    environment = machine.environment()
    assert environment.accelerators is None
    assert not calls.exists()
    fields = json.loads(environment.model_dump_json())
    del fields["accelerators"]
    assert schema.Environment.model_validate_json(json.dumps(fields)) == environment
