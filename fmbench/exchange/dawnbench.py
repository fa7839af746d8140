"""DAWNBench's form of a training, as its entries for CIFAR-10 have it: epoch, hours, accuracy on the test set."""

from fmbench.records.schema import RunRecord


def render(record: RunRecord) -> str:
    """A line for each epoch after which the test set was evaluated: the last one alone, if validation was watched.

    Hours are of training steps, from the first one; accuracies in percent.
    """
    lines, seconds = ["epoch\thours\ttop1Accuracy"], 0.0
    for epoch in record.history:
        seconds += epoch.train_seconds
        accuracy = record.test_accuracy if epoch is record.history[-1] else epoch.test_accuracy
        if accuracy is not None:
            lines.append(f"{epoch.epoch}\t{seconds / 3600}\t{round(100 * accuracy, 2)}")
    return "\n".join(lines) + "\n"
