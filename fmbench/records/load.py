"""Whether the times of a run are those of the run alone."""

from collections.abc import Iterator

from fmbench.records.schema import Epoch, RunRecord

# Shares of the core-seconds that a run could have had. Quiet machines stay below a half of each.
OTHERS, STOLEN = 0.05, 0.01
# Core-seconds of epochs of equal work, the most by the least. In the 41 committed runs of speedrun and vgg_like,
# made on a quiet machine, it is 1.14 at most.
SPREAD = 1.2
LEAST_CORE_SECONDS = 0.5  # of an epoch whose spread says something


def is_busy(record: RunRecord) -> bool:
    """Whether a run was stopped, or shared its machine, by the noted load or by its core-seconds' spread.

    The time in which it lay still is in no other; but caches are cold then, and accelerators went on meanwhile.
    """
    history = record.history
    if any(epoch.asleep_seconds for epoch in history):
        return True
    cores = record.environment.cpu_quota or record.environment.cpu_cores
    seconds = sum(epoch.train_seconds for epoch in history)
    others = sum(epoch.other_core_seconds or 0 for epoch in history)
    stolen = sum(epoch.stolen_core_seconds or 0 for epoch in history)
    if others > OTHERS * cores * seconds or stolen > STOLEN * cores * seconds:
        return True
    if any(_is_crowded(epoch) for epoch in history):
        return True
    longest = all(epoch.train_core_seconds >= LEAST_CORE_SECONDS for epoch in history)
    return longest and core_seconds_spread(record) > SPREAD


def core_seconds_spread(record: RunRecord) -> float:
    """The most core-seconds of an epoch divided by the least, among those of one stage, which do equal work."""
    spreads: list[float] = [1.0]
    for epochs in _stages(record):
        core_seconds = [epoch.train_core_seconds for epoch in epochs]
        if least := min(core_seconds, default=0.0):
            spreads.append(max(core_seconds) / least)
    return max(spreads)


def _is_crowded(epoch: Epoch) -> bool:
    """By the load average, where the system tells nothing better: more threads were ready than ran in this run."""
    if epoch.load_average is None or epoch.other_core_seconds is not None or not epoch.train_seconds:
        return False
    return epoch.load_average - epoch.train_core_seconds / epoch.train_seconds > 0.5


def _stages(record: RunRecord) -> Iterator[list[Epoch]]:
    """The history, cut where a stage ended; a part of a last one, too."""
    rest = record.history
    for stage in record.stages:
        yield rest[: stage.num_epochs]
        rest = rest[stage.num_epochs :]
    yield rest
