"""A worker that measures nothing: it speaks the protocol of benchmarks/, with numbers known beforehand.

What it is (fmbench_itself, peer_torch, ...) is its file's name. FAKE_WORKERS, JSON, says who misbehaves:
{"<file> <variant>": ["<command>" or "<command> <model>", "<how>"]}. Every command is a line of the file
FAKE_WORKERS_LOG.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

LOGITS = [[float(label == image % 10) for label in range(10)] for image in range(64)]
SPEEDS = {"fmbench_itself": 6000, "peer_flax": 2000, "peer_torch": 3000, "peer_keras": 4000}
ROUNDS = (1, 3, 2)  # times the speed; the median is twice the speed
NAME = Path(sys.argv[0]).stem


def misbehave(how: str) -> None:
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "die":
        sys.exit("Traceback\nout of | memory")
    if how == "flag":
        sys.exit(
            f"F1 parse.cc:1] Unknown flag in XLA_FLAGS: {os.environ['XLA_FLAGS']}\n*** stack trace: ***\n@ 0x1"
        )
    if how == "error":
        answer({"error": "no such\nlayer"})
        sys.exit(1)
    if how == "hang":
        time.sleep(60)
    if how == "nonsense":
        answer({"images": "many"})
        time.sleep(60)
    if how == "interrupt":
        os.kill(os.getppid(), signal.SIGINT)
        time.sleep(60)


def environ() -> dict:
    return {
        name: os.environ.get(name, "")
        for name in ("XLA_FLAGS", "JAX_DEFAULT_MATMUL_PRECISION", "FMBENCH_CACHE", "OMP_WAIT_POLICY")
    }


def answer(fields: dict) -> None:
    print(json.dumps(fields), flush=True)


def compile_seconds(who: str) -> float:
    """8 for the first to compile with this cache, then 1."""
    mark = Path(os.environ["FMBENCH_CACHE"]) / f"{who} compiled"
    if mark.exists():
        return 1.0
    mark.touch()
    return 8.0


def main() -> None:
    if sys.argv[1:2] == ["weights"]:
        if os.environ.get("FAKE_WEIGHTS") == "fail":
            sys.exit("no weights today")
        Path(sys.argv[3]).touch()
        return
    job = json.loads(sys.stdin.readline())
    who = f"{NAME} {job['variant']}"
    command, how = json.loads(os.environ["FAKE_WORKERS"]).get(who, ("", ""))
    rounds = 0

    def obey(do: str, seconds: float = 0.0, batch_size: int = 0) -> dict:
        nonlocal rounds
        with Path(os.environ["FAKE_WORKERS_LOG"]).open("a") as log:
            log.write(
                json.dumps(
                    {"who": who, "do": do, "seconds": seconds, "size": batch_size, "pid": os.getpid()}
                    | environ()
                    | job
                )
                + "\n"
            )
        if command in (do, f"{do} {job['model']}", f"{do} {os.environ.get('XLA_FLAGS')}"):
            misbehave(how)
        match do:
            case "job":
                num_params = 11 if how == "params" else 10
                return {
                    "ready": True,
                    "system": f"Fake {who}",
                    "versions": {"fake": "1"},
                    "num_params": num_params,
                    "bytes_per_image": 2e6,
                }
            case "logits":
                shift = float(how) if command == "shift" else 0.0
                return {"logits": [[logit + shift for logit in row] for row in LOGITS]}
            case "compile":
                return {"compile_seconds": compile_seconds(who), "flops_per_image": 1e6}
            case "train":
                rounds += 1
                images = SPEEDS[NAME] * ROUNDS[(rounds - 1) % 3]
                if how == "spin":  # threads that wait asleep are slower to go on, and cost less
                    asleep = os.environ.get("OMP_WAIT_POLICY") == "PASSIVE"
                    return {
                        "images": images,
                        "seconds": 1.25 if asleep else 1.0,
                        "core_seconds": 1 if asleep else 2,
                    }
                return {"images": images, "seconds": 1.0, "core_seconds": 2.0}
            case "infer":
                per_image = {1: 1, 32: 5}.get(batch_size, 10)
                return {"images": per_image * SPEEDS[NAME], "seconds": 1.0, "core_seconds": 2.0}
            case "memory":
                return {"peak_memory_bytes": job["copies"] * job["seeds"] * 10**8}
        raise ValueError(do)

    answer(obey("job"))
    for line in sys.stdin:
        request = json.loads(line)
        answer(obey(request["do"], request.get("seconds", 0.0), request.get("batch_size", 0)))


if __name__ == "__main__":
    main()
