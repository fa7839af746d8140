"""Ways of running fmbench that an accelerator may prefer to the default one."""

from typing import NamedTuple

from ml_collections import config_dict

from fmbench.throughput.measurements import Dtype
from fmbench.throughput.workers import with_xla_flags

CONFIGS = ("configs/speedrun.py:94", "configs/vgg_like.py", "configs/resnet.py:20")
CPU_CONFIGS = (
    "configs/mlp.py",
)  # a rehearsal: in the loops of some arms XLA convolves 10 to 20 times slower there
NUM_TRAIN = 60_000


class Arm(NamedTuple):
    """What is other than by default."""

    name: str
    dtype: Dtype
    steps_per_call: int = 0  # by default
    xla_flags: str = ""  # beside those that are set already; an XLA that lacks one ends the process, and says so
    matmul_precision: str = ""
    pipeline: str = "resident"


def choose_arms(run_config: config_dict.ConfigDict) -> list[Arm]:
    """The arms of an entry; the first is the default."""
    dtype: Dtype = run_config.dtype
    other: Dtype = "float32" if dtype == "bfloat16" else "bfloat16"
    steps_per_epoch = NUM_TRAIN // run_config.batch_size
    flags = {
        # XLA's default has kernels, cuBLAS and cuDNN's graphs in command buffers, but not convolutions nor loops.
        "command buffers: convolutions too": "--xla_gpu_enable_command_buffer=+CONVOLUTION",
        "command buffers: convolutions and loops too": "--xla_gpu_enable_command_buffer=+CONVOLUTION,+WHILE",
        "no command buffers": "--xla_gpu_enable_command_buffer=",
        "cuDNN graph fusion": "--xla_gpu_experimental_enable_conv_fusion=true",
        "NHWC forced": "--xla_gpu_force_conv_nhwc=true",
        "NCHW forced": "--xla_gpu_force_conv_nchw=true",
        **{f"autotune level {level} of 4": f"--xla_gpu_autotune_level={level}" for level in range(4)},
    }
    return [
        Arm("default", dtype),
        Arm("1 step a call", dtype, steps_per_call=1),
        Arm("100 steps a call", dtype, steps_per_call=100),
        # The default of accelerators: so this row and the first show what is chance.
        Arm("an epoch a call", dtype, steps_per_call=steps_per_epoch),
        # Stands for a whole run: the epochs of a call share one order, since the order is an argument of the call.
        Arm("3 epochs a call", dtype, steps_per_call=3 * steps_per_epoch),
        Arm("images from disk, by grain", dtype, pipeline="grain"),
        Arm(f"{other}", other),
        Arm("float32 in full, not TF32", "float32", matmul_precision="highest"),
        *(Arm(name, dtype, xla_flags=flag) for name, flag in flags.items()),
    ]


def environ_of(arm: Arm, environ: dict[str, str]) -> dict[str, str]:
    """The environment of its worker."""
    changed = with_xla_flags(dict(environ), arm.xla_flags)
    if arm.matmul_precision:
        changed["JAX_DEFAULT_MATMUL_PRECISION"] = arm.matmul_precision
    return changed
