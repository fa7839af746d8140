"""Hugging Face's evaluation results (`model-index`), and the card of an exported model.

The form is that of https://github.com/huggingface/hub-docs/blob/main/modelcard.md, as `huggingface_hub.ModelCard`
reads it.
"""

from collections.abc import Sequence
from typing import Any

import yaml

from fmbench.data import proof
from fmbench.pages.generated import text
from fmbench.records.schema import RunRecord

DATASET = "zalando-datasets/fashion_mnist"  # on the hub, with the images of the standard data


def render(records: Sequence[RunRecord]) -> str:
    """The results of some records as YAML, to be put into the front matter of a README.md."""
    return _yaml({"model-index": [_results(record) for record in records]})


def card(record: RunRecord, files: dict[str, str], checked: str, temperature: float | None) -> str:
    """README.md of an exported model.

    Args:
        record: Of the run that trained it.
        files: What is in each file, by name.
        checked: How the export was compared with the model, in words.
        temperature: By which the logits are divided before the softmax, if it was fitted.
    """
    metadata = {
        "license": "apache-2.0",
        "library_name": "fmbench",
        "pipeline_tag": "image-classification",
        "tags": ["fashion-mnist", "jax", "flax"],
        **({"datasets": [DATASET]} if record.data_version == proof.STANDARD else {}),
        "metrics": ["accuracy"],
        "model-index": [_results(record)],
    }
    environment = record.environment
    commit = f"{environment.git_commit or 'not known'}{' (with changes)' if environment.git_dirty else ''}"
    lines = [
        f"---\n{_yaml(metadata)}---\n",
        f"# {text(record.entry)}, seed {record.seed}\n",
        f"An image classifier for {text(_dataset(record)['name'])}, trained by fmbench: {text(record.model)}, "
        f"{record.num_trainable_params:,} trainable parameters, {record.dtype}.\n",
        f"- Test accuracy {100 * (record.test_accuracy or 0):.2f} % on {record.num_test:,} images, last epoch.",
        f"- Epochs: {record.num_epochs:,}, of {record.num_train:,} images in batches of "
        f"{record.batch_size:,}, in {record.train_seconds:,.1f} s on {text(environment.machine_title)}.",
        f"- Code: {text(record.config_file)} at commit {text(commit)}.",
        *([f"- Probabilities: the softmax of the logits divided by {temperature:.4g}."] if temperature else []),
        f"- {checked}\n",
        "| file | what is in it |\n|:--|:--|",
        *(f"| {name} | {content} |" for name, content in files.items()),
    ]
    return "\n".join(lines) + "\n"


def _results(record: RunRecord) -> dict[str, Any]:
    found = [
        ("accuracy", record.test_accuracy, "Test accuracy"),
        ("accuracy", record.test_top5_accuracy, "Test top-5 accuracy"),
        ("loss", record.test_loss, "Test loss"),
    ]
    metrics = [{"type": kind, "value": value, "name": name} for kind, value, name in found if value is not None]
    task = {"type": "image-classification", "name": "Image Classification"}
    return {"name": record.name, "results": [{"task": task, "dataset": _dataset(record), "metrics": metrics}]}


def _dataset(record: RunRecord) -> dict[str, str]:
    if record.data_version == proof.STANDARD:
        return {"type": DATASET, "name": "Fashion-MNIST", "split": "test"}
    return {"type": "other", "name": f"data of {record.data_version}", "split": "test"}


def _yaml(content: dict[str, Any]) -> str:
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=1000)
