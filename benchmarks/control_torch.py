"""Reference systems in PyTorch, as their authors' code has them: log-softmax and NLL, PyTorch's own Adam.

`control.py` says how it is spoken to. Initial values are PyTorch's. Epochs end with a
smaller batch, where the images fill no whole one.
"""

import sys

import control

if __name__ == "__main__":
    CONTROL = control.open_control()

import numpy as np
import torch
import torch.nn.functional as F
from peer_torch import MODELS


def run(told: control.Control) -> None:
    job = told.job
    torch.manual_seed(job.seed)
    torch.set_num_threads(1)  # in nets as small as these, threads wait longer than they work
    model = MODELS[job.model](**job.arguments)
    optimizer = make_optimizer(model, job.optimizer)
    num_params = sum(parameter.numel() for parameter in model.parameters())
    told.tell(
        system=f"PyTorch {torch.__version__.partition('+')[0]}",
        versions={"torch": torch.__version__, "numpy": np.__version__},
        num_params=num_params,
    )
    images = {part: torch.from_numpy(array).permute(0, 3, 1, 2) for part, array in told.images.items()}
    labels = {part: torch.from_numpy(array.astype(np.int64)) for part, array in told.labels.items()}

    def predict(images: torch.Tensor) -> torch.Tensor:
        model.eval()
        with torch.no_grad():
            return torch.cat([model(part).argmax(dim=-1) for part in images.split(1000)])

    for number, stage in enumerate(job.stages, start=1):
        if any(stage["augment"].values()):
            raise ValueError("this control does not augment")
        for _ in range(stage["num_epochs"]):
            model.train()
            loss_sum = correct = 0.0
            for indices in torch.randperm(len(labels["train"])).split(job.batch_size):
                log_probabilities = F.log_softmax(model(images["train"][indices]), dim=-1)
                loss = F.nll_loss(log_probabilities, labels["train"][indices])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                loss_sum += loss.item() * len(indices)
                correct += (log_probabilities.argmax(dim=-1) == labels["train"][indices]).sum().item()
            count = len(labels["train"])
            val_accuracy = None
            if "validation" in told.evaluated():
                val_accuracy = (predict(images["validation"]) == labels["validation"]).double().mean().item()
            told.tell(train_loss=loss_sum / count, train_accuracy=correct / count, val_accuracy=val_accuracy)
        told.end_stage(number, lambda array: predict(torch.from_numpy(array).permute(0, 3, 1, 2)).numpy())


def make_optimizer(model: torch.nn.Module, settings: dict) -> torch.optim.Optimizer:
    if settings["name"] != "adam":
        raise ValueError(f"this control does not do {settings['name']}")
    betas = (settings["b1"], settings["b2"])
    return torch.optim.Adam(model.parameters(), settings["learning_rate"], betas, settings["eps"])


if __name__ == "__main__":
    run(CONTROL)
    CONTROL.write()
    sys.exit()
