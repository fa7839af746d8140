"""MLPerf's log of a training (`:::MLLOG`), written after the run from its record.

The keys are those of `mlperf_logging.mllog.constants`. A record has lengths of time, not the times of day at which
an epoch began: they follow from when its first process began, as if no other had been needed.
"""

import datetime
import json
from typing import Any

from fmbench.records.schema import RunRecord

START, END, POINT = "INTERVAL_START", "INTERVAL_END", "POINT_IN_TIME"


def render(record: RunRecord) -> str:
    """The log of a completed run.

    run_start is the first step. What lies between an epoch's last step and the next one's first, evaluation and
    checkpoints, is the interval of eval_start and eval_stop. No cache is cleared, as cache_clear says.
    """
    lines: list[str] = []

    def log(seconds: float, event: str, key: str, value: Any = None, **metadata: Any) -> None:
        content = {"namespace": "", "time_ms": round(1000 * (began + seconds)), "event_type": event, "key": key}
        lines.append(f":::MLLOG {json.dumps(content | {'value': value, 'metadata': metadata})}")

    began = _began(record)
    log(0, POINT, "cache_clear", False)
    log(0, START, "init_start")
    for key, value in _settings(record).items():
        log(0, POINT, key, value)
    now = record.setup_seconds + record.compile_seconds
    end = now + record.train_seconds + max(_gaps(record), record.eval_seconds + record.checkpoint_seconds)
    log(now, END, "init_stop")
    log(now, START, "run_start")
    for epoch, following in zip(record.history, [*record.history[1:], None], strict=True):
        number = {"epoch_num": epoch.epoch}
        log(now, START, "epoch_start", **number)
        now += epoch.train_seconds
        log(now, END, "epoch_stop", **number)
        log(now, POINT, "tracked_stats", {"throughput": epoch.train_images_per_sec}, **number)
        watched = {"validation": epoch.val_accuracy, "test": epoch.test_accuracy}
        if following is None:
            watched["test"] = record.test_accuracy
        log(now, START, "eval_start", **number)
        now = now + (following.gap_seconds or 0) if following else end
        for split, accuracy in watched.items():
            if accuracy is not None:
                log(now, POINT, "eval_accuracy", accuracy, **number, split=split)
        log(now, END, "eval_stop", **number)
    log(now, END, "run_stop", status="success")
    return "\n".join(lines) + "\n"


def _began(record: RunRecord) -> float:
    """Seconds since 1970."""
    if record.processes:
        return datetime.datetime.fromisoformat(record.processes[0].began).timestamp()
    return datetime.datetime.fromisoformat(record.created).timestamp() - record.wall_seconds


def _gaps(record: RunRecord) -> float:
    return sum(epoch.gap_seconds or 0 for epoch in record.history[1:])


def _settings(record: RunRecord) -> dict[str, Any]:
    optimizer = record.config.get("optimizer", {})
    return {
        "submission_benchmark": "fashion_mnist",
        "submission_division": "open",
        "submission_org": "fmbench",
        "submission_platform": f"{record.environment.num_devices} x {record.environment.device_kind}",
        "submission_status": "research",
        "seed": record.seed,
        "global_batch_size": record.batch_size,
        "train_samples": record.num_train,
        "eval_samples": record.num_test,
        "opt_name": optimizer.get("name"),
        "opt_base_learning_rate": optimizer.get("learning_rate"),
        "lowest_numerical_precision_in_linear": {"float32": "fp32"}.get(record.dtype, record.dtype),
    }
