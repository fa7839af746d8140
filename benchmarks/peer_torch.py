"""PyTorch, for `python -m fmbench.benchmark`: the same nets as an expert of PyTorch runs them.

Channels last, fused optimizers; eager or torch.compile, float32 or autocast to bfloat16. On CPUs a thread per
core; torch.compile needs a C++ compiler there. On an NVIDIA GPU all data stay on the device, cuDNN times its
algorithms, float32 is multiplied as TF32, as JAX does it by default, torch.compile is told "max-autotune", which
makes CUDA graphs of the forward and the backward pass, and `graph` is the whole step, compiled, in one CUDA graph.
"""

import protocol

if __name__ == "__main__":
    ANSWERS = protocol.claim_stdout()

import functools
import itertools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


def nhwc_flatten(x: torch.Tensor) -> torch.Tensor:
    """In the order of the given weights, which is also the order in memory: no copy."""
    return x.permute(0, 2, 3, 1).flatten(1)


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense1 = nn.Linear(784, 256)
        self.dropout1 = nn.Dropout(0.4)
        self.dense2 = nn.Linear(256, 512)
        self.dropout2 = nn.Dropout(0.4)
        self.dense3 = nn.Linear(512, 100)
        self.dropout3 = nn.Dropout(0.5)
        self.head = nn.Linear(100, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(1)
        x = self.dropout1(F.leaky_relu(self.dense1(x), 0.3))
        x = self.dropout2(F.leaky_relu(self.dense2(x), 0.3))
        x = self.dropout3(F.leaky_relu(self.dense3(x), 0.3))
        return self.head(x)


class FullyConnected(nn.Module):
    def __init__(self, widths: Sequence[int], num_dropouts: int):
        super().__init__()
        self.hidden = nn.ModuleList(nn.Linear(*sizes) for sizes in itertools.pairwise([784, *widths]))
        self.num_dropouts = num_dropouts
        self.dropout = nn.Dropout(0.25)
        self.head = nn.Linear(widths[-1], 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(1)
        for number, layer in enumerate(self.hidden):
            x = F.relu(layer(x))
            if number < self.num_dropouts:
                x = self.dropout(x)
        return self.head(x)


class Baseline(nn.Module):
    def __init__(self, filters: int = 32, padding: str = "VALID"):
        super().__init__()
        side = 14 if padding == "SAME" else 13
        self.conv1 = nn.Conv2d(1, filters, 3, padding=padding.lower())
        self.dense1 = nn.Linear(side * side * filters, 100)
        self.head = nn.Linear(100, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nhwc_flatten(F.max_pool2d(F.relu(self.conv1(x)), 2))
        x = F.relu(self.dense1(x))
        return self.head(x)


class CNN1(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3)
        self.dropout1 = nn.Dropout(0.2)
        self.dense1 = nn.Linear(13 * 13 * 32, 128)
        self.head = nn.Linear(128, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = nhwc_flatten(self.dropout1(x))
        x = F.relu(self.dense1(x))
        return self.head(x)


class CNN2(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 64, 3)
        self.dropout1 = nn.Dropout(0.25)
        self.conv2 = nn.Conv2d(64, 32, 3)
        self.dense1 = nn.Linear(5 * 5 * 32, 32)
        self.head = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.dropout1(F.max_pool2d(F.relu(self.conv1(x)), 2))
        x = nhwc_flatten(F.max_pool2d(F.relu(self.conv2(x)), 2))
        x = F.relu(self.dense1(x))
        return F.logsigmoid(self.head(x))


class CNN3(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3)
        self.dropout1 = nn.Dropout(0.25)
        self.conv2 = nn.Conv2d(32, 64, 3)
        self.dropout2 = nn.Dropout(0.25)
        self.conv3 = nn.Conv2d(64, 128, 3)
        self.dropout3 = nn.Dropout(0.4)
        self.dense1 = nn.Linear(3 * 3 * 128, 128)
        self.dropout4 = nn.Dropout(0.3)
        self.head = nn.Linear(128, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.dropout1(F.max_pool2d(F.relu(self.conv1(x)), 2))
        x = self.dropout2(F.max_pool2d(F.relu(self.conv2(x)), 2))
        x = nhwc_flatten(self.dropout3(F.relu(self.conv3(x))))
        x = self.dropout4(F.relu(self.dense1(x)))
        return self.head(x)


class CNN4(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        # torch's momentum is the weight of the new value: Keras's 0.99 is 0.01 here.
        norm = {"eps": 1e-3, "momentum": 0.01}
        self.conv1 = nn.Conv2d(1, 32, 3)
        self.norm1 = nn.BatchNorm2d(32, **norm)
        self.conv2 = nn.Conv2d(32, 32, 3)
        self.norm2 = nn.BatchNorm2d(32, **norm)
        self.dropout2 = nn.Dropout(0.25)
        self.conv3 = nn.Conv2d(32, 64, 3)
        self.norm3 = nn.BatchNorm2d(64, **norm)
        self.dropout3 = nn.Dropout(0.25)
        self.conv4 = nn.Conv2d(64, 128, 3)
        self.norm4 = nn.BatchNorm2d(128, **norm)
        self.dropout4 = nn.Dropout(0.25)
        self.dense1 = nn.Linear(4 * 4 * 128, 512)
        self.norm5 = nn.BatchNorm1d(512, **norm)
        self.dropout5 = nn.Dropout(0.5)
        self.dense2 = nn.Linear(512, 128)
        self.norm6 = nn.BatchNorm1d(128, **norm)
        self.dropout6 = nn.Dropout(0.5)
        self.head = nn.Linear(128, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm1(F.relu(self.conv1(x)))
        x = self.norm2(F.relu(self.conv2(x)))
        x = self.dropout2(F.max_pool2d(x, 2))
        x = self.dropout3(self.norm3(F.relu(self.conv3(x))))
        x = self.norm4(F.relu(self.conv4(x)))
        x = nhwc_flatten(self.dropout4(F.max_pool2d(x, 2)))
        x = self.dropout5(self.norm5(F.relu(self.dense1(x))))
        x = self.dropout6(self.norm6(F.relu(self.dense2(x))))
        return self.head(x)


class VGGLike(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1)
        self.dropout2 = nn.Dropout(0.5)
        self.conv3 = nn.Conv2d(64, 128, 3, padding=1)
        self.conv4 = nn.Conv2d(128, 256, 3)
        self.dropout4 = nn.Dropout(0.5)
        self.dense1 = nn.Linear(4 * 4 * 256, 256)
        self.dropout5 = nn.Dropout(0.5)
        self.dense2 = nn.Linear(256, 256)
        self.head = nn.Linear(256, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.conv1(x))
        x = self.dropout2(F.max_pool2d(F.relu(self.conv2(x)), 2))
        x = F.relu(self.conv3(x))
        x = self.dropout4(F.max_pool2d(F.relu(self.conv4(x)), 3))
        x = nhwc_flatten(x)
        x = self.dropout5(F.leaky_relu(self.dense1(x), 0.3))
        x = F.leaky_relu(self.dense2(x), 0.3)
        return self.head(x)


class BasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, strides: int):
        super().__init__()
        self.strides = strides
        self.extra_channels = outputs - inputs
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=strides, padding=1 if strides == 1 else 0, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)  # eps 1e-5 and momentum 0.1 are its defaults
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Strided over an even size, XLA's and TensorFlow's 'SAME' pads below and to the right only.
        padded = x if self.strides == 1 else F.pad(x, (0, 1, 0, 1))
        y = F.relu(self.norm1(self.conv1(padded)))
        y = self.norm2(self.conv2(y))
        if self.strides > 1:
            x = F.pad(x[:, :, :: self.strides, :: self.strides], (0, 0, 0, 0, 0, self.extra_channels))
        return F.relu(y + x)


class ResNet(nn.Module):
    def __init__(self, depth: int = 20):
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(16)
        blocks = []
        inputs = 16
        for outputs in (16, 32, 64):
            for _ in range((depth - 2) // 6):
                blocks.append(BasicBlock(inputs, outputs, 1 if inputs == outputs else 2))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.blocks(F.relu(self.stem_norm(self.stem(x))))
        return self.head(x.mean(dim=(2, 3)))


class Stem(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm3 = nn.BatchNorm2d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu_(self.norm1(self.conv1(x)))
        y = torch.relu_(self.norm2(self.conv2(x)))
        return x + torch.relu_(self.norm3(self.conv3(y)))


class Speedrun(nn.Module):
    def __init__(self, stem_width: int = 4, widths: Sequence[int] = (32, 64, 128)):
        super().__init__()
        first, second, third = widths
        self.stem = Stem(stem_width)
        self.conv1 = nn.Conv2d(stem_width, first, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(first)
        self.conv2 = nn.Conv2d(first, first, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(first)
        self.conv3 = nn.Conv2d(first, second, 3, padding=1, bias=False)
        self.norm3 = nn.BatchNorm2d(second)
        self.conv4 = nn.Conv2d(second, second, 3, padding=1, bias=False)
        self.norm4 = nn.BatchNorm2d(second)
        self.conv5 = nn.Conv2d(second, third, 3, padding=1, bias=False)
        self.norm5 = nn.BatchNorm2d(third)
        self.conv6 = nn.Conv2d(third, third, 3, padding=1, bias=False)
        self.norm6 = nn.BatchNorm2d(third)
        self.head = nn.Linear(third, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu_(self.norm1(F.max_pool2d(self.conv1(self.stem(x)), 2)))
        x = torch.relu_(self.norm2(self.conv2(x)))
        x = torch.relu_(self.norm3(F.max_pool2d(self.conv3(x), 2)))
        x = torch.relu_(self.norm4(self.conv4(x)))
        x = torch.relu_(self.norm5(self.conv5(F.max_pool2d(x, 2))))
        x = x + torch.relu_(self.norm6(self.conv6(x)))
        return self.head(F.adaptive_max_pool2d(x, 1).flatten(1))


MODELS: dict[str, type[nn.Module]] = {
    "mlp": MLP,
    "fully_connected": FullyConnected,
    "baseline": Baseline,
    "cnn1": CNN1,
    "cnn2": CNN2,
    "cnn3": CNN3,
    "cnn4": CNN4,
    "vgg_like": VGGLike,
    "resnet": ResNet,
    "speedrun": Speedrun,
}


class PyTorch:
    """A net with its optimizer and its data."""

    def __init__(self, job: protocol.Job):
        self.device = choose_device(job.platform)
        self.on_gpu = self.device.type == "cuda"
        modes = ("eager", "compile", "graph") if self.on_gpu else ("eager", "compile")
        job.check_variant(*(f"{mode}-{dtype}" for mode in modes for dtype in ("float32", "bfloat16")))
        job.check_step("label_smoothing", "selection", "keep_norm", "crop_padding", "flip")
        torch.set_num_threads(protocol.num_cores())
        torch.manual_seed(protocol.SEED)
        torch.backends.cudnn.benchmark = True
        allow_tf32(True)
        self.job = job
        images, labels = job.load_rows()
        self.images = torch.from_numpy(images).to(self.device)
        self.labels = torch.from_numpy(labels.astype(np.int64)).to(self.device)
        augments = any(job.augment.values())
        self.crops = all_crops(self.images, job.augment["crop_padding"]) if augments else None
        self.last_losses = None
        if job.selection.get("easy"):
            self.last_losses = torch.full((len(images),), math.inf, device=self.device)
        self.train_batches = shuffled_batches(len(images), job.batch_size, self.device)
        self.infer_batches = functools.cache(
            functools.partial(consecutive_batches, len(images), device=self.device)
        )

        self.model = MODELS[job.model](**job.arguments)
        weights = job.load_weights()
        if weights is not None:
            set_weights(self.model, weights)
        self.model.to(device=self.device, memory_format=torch.channels_last)
        self.optimizers = make_optimizers(self.model, job.optimizer, capturable=self.on_gpu)
        self.loss = self.model_loss
        self.classes = self.model_classes
        self.graphs: dict[int, Callable[[torch.Tensor], torch.Tensor]] = {}  # of inference, by batch size
        self.update = self.plain_update

        self.mode, dtype = job.variant.split("-")
        autocast = ", autocast" if dtype == "bfloat16" else ""
        on_gpu = (
            f", {torch.cuda.get_device_name()}, cuDNN {torch.backends.cudnn.version()}, TF32"
            if self.on_gpu
            else ""
        )
        self.name = f"PyTorch {torch.__version__} {self.mode}, channels_last{autocast}{on_gpu}"
        self.versions = {"torch": torch.__version__}
        self.bytes_per_image: float | None = None
        self.num_params = sum(array.numel() for array in canonical(self.model).values())
        self.num_trainable_params = sum(parameter.numel() for parameter in self.model.parameters())

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        scale, shift = protocol.normalization_constants(self.job.normalization)
        x = images.view(-1, 1, 28, 28).float().mul_(scale).add_(shift)
        # A cache of converted weights, of use where one is used twice, would not live through a CUDA graph.
        autocast = torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.job.dtype == "bfloat16", cache_enabled=False
        )
        with autocast:
            logits = self.model(x)
        return logits.float()

    def model_loss(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The batch's mean loss, and the losses of its examples."""
        losses = F.cross_entropy(
            self.forward(images), labels, reduction="none", label_smoothing=self.job.label_smoothing
        )
        return losses.mean(), losses.detach()

    def model_classes(self, images: torch.Tensor) -> torch.Tensor:
        return self.forward(images).argmax(dim=-1)

    def logits(self, count: int) -> np.ndarray:
        self.model.eval()
        allow_tf32(False)  # to be compared
        with torch.inference_mode():
            logits = self.forward(self.images[:count]).cpu().numpy()
        allow_tf32(True)
        return logits

    def compile(self) -> None:
        if self.mode != "eager":
            modes = {"compile": "max-autotune", "graph": "max-autotune-no-cudagraphs"}
            mode = modes[self.mode] if self.on_gpu else None
            self.loss = torch.compile(self.model_loss, dynamic=False, mode=mode)
            self.classes = torch.compile(self.model_classes, dynamic=False, mode=mode)
        self.model.train()
        if self.mode == "graph":
            self.update = captured(self.plain_update, next(self.train_batches))
        self.wait(self.train_step()[1])  # compiles, or picks primitives and plans
        self.wait(self.infer_step(self.job.infer_batch_size)[1])

    def train_step(self) -> tuple[int, Any]:
        self.model.train()
        return self.job.batch_size, self.started(self.update, next(self.train_batches))

    def started(self, function: Callable[[torch.Tensor], torch.Tensor], batch: torch.Tensor) -> Any:
        """Calls it; what `wait` takes is the result or, on a GPU, an event after it."""
        if not self.on_gpu:
            return function(batch)
        if self.mode == "compile":
            torch.compiler.cudagraph_mark_step_begin()
        function(batch)
        event = torch.cuda.Event()
        event.record()
        return event

    def plain_update(self, indices: torch.Tensor) -> torch.Tensor:
        """One update; the batch's mean loss before it."""
        loss, losses = self.loss(self.augmented(indices), self.labels[indices])
        self.model.zero_grad(set_to_none=True)
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
        if self.last_losses is not None:
            self.last_losses[indices] = losses
        return loss

    def augmented(self, indices: torch.Tensor) -> torch.Tensor:
        """These train images, each cropped and flipped by itself."""
        if self.crops is None:
            return self.images[indices]
        corners = torch.randint(self.crops.shape[1], (2, len(indices)), device=self.device)
        images = self.crops[indices, corners[0], corners[1]]
        if self.job.augment["flip"]:
            flipped = torch.rand(len(indices), 1, 1, device=self.device) < 0.5
            images = torch.where(flipped, images.flip(2), images)
        return images

    def infer_step(self, batch_size: int) -> tuple[int, Any]:
        if self.model.training:
            self.model.eval()
        images = self.images[next(self.infer_batches(batch_size))]
        with torch.inference_mode():
            if self.mode == "graph" and batch_size not in self.graphs:
                self.graphs[batch_size] = captured(self.classes, images)
            started = self.started(self.graphs.get(batch_size, self.classes), images)
        return batch_size, started

    def wait(self, started: Any) -> None:
        """On CPUs a step is done when its call returns."""
        if self.on_gpu:
            started.synchronize()

    def peak_memory_bytes(self) -> int:
        return torch.cuda.max_memory_allocated() if self.on_gpu else protocol.process_peak_memory_bytes()


def choose_device(platform: str) -> torch.device:
    """The device for a job's platform.

    Raises:
        protocol.RefusalError: If this PyTorch cannot use it.
    """
    if platform == "cpu":
        return torch.device("cpu")
    if platform == "gpu" and torch.cuda.is_available():
        return torch.device("cuda")
    raise protocol.RefusalError(f"PyTorch {torch.__version__} has no {platform} here")


def allow_tf32(allowed: bool) -> None:
    """On NVIDIA GPUs: whether float32 is multiplied with 10 bits of mantissa, as JAX does by default there."""
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


def shuffled_batches(num_rows: int, batch_size: int, device: torch.device) -> Iterator[torch.Tensor]:
    """`protocol.shuffled_batches`, of which the device gets an epoch at a time."""
    if batch_size > num_rows:
        raise protocol.RefusalError(f"batch_size is {batch_size}, but the train set has only {num_rows} images")
    while True:
        order = torch.randperm(num_rows, device=device)
        for start in range(0, num_rows - batch_size + 1, batch_size):
            yield order[start : start + batch_size]


def consecutive_batches(num_rows: int, batch_size: int, device: torch.device) -> Iterator[torch.Tensor]:
    """`protocol.consecutive_batches` on the device."""
    for start in itertools.count(0, batch_size):
        yield torch.arange(start, start + batch_size, device=device) % num_rows


def captured(function: Callable[[torch.Tensor], torch.Tensor], batch: torch.Tensor) -> Callable[..., torch.Tensor]:
    """The function as a CUDA graph, for batches of this shape, after it has been called some times."""
    given = batch.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function(given)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function(given)

    def replay(batch: torch.Tensor) -> torch.Tensor:
        given.copy_(batch)
        graph.replay()
        return result

    return replay


def all_crops(images: torch.Tensor, padding: int) -> torch.Tensor:
    """Views of images (n, 784), padded with black: [image, top, left] is a crop of 28 x 28."""
    padded = F.pad(images.view(-1, 28, 28), [padding] * 4)
    return padded.unfold(1, 28, 1).unfold(2, 28, 1)


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal, for kernels, as matrices of outputs x inputs, with Nesterov's momentum.

    PyTorch's own takes two-dimensional parameters alone, computes in bfloat16, and weighs the first gradients
    otherwise than optax.
    """

    def __init__(self, kernels: list[torch.Tensor], learning_rate: float, momentum: float, weight_decay: float):
        super().__init__(kernels, {"lr": learning_rate, "momentum": momentum, "weight_decay": weight_decay})
        self.averages = [torch.zeros_like(kernel) for kernel in kernels]
        self.steps_done = torch.zeros((), device=kernels[0].device)  # there, for CUDA graphs

    @torch.no_grad()
    def step(self) -> None:
        (group,) = self.param_groups
        momentum = group["momentum"]
        grads = [kernel.grad for kernel in group["params"]]
        self.steps_done += 1
        torch._foreach_lerp_(self.averages, grads, 1 - momentum)
        updates = torch._foreach_mul(self.averages, momentum / (1 - momentum ** (self.steps_done + 1)))
        torch._foreach_add_(updates, torch._foreach_mul(grads, (1 - momentum) / (1 - momentum**self.steps_done)))
        torch._foreach_mul_(group["params"], 1 - group["lr"] * group["weight_decay"])
        for kernel, update in zip(group["params"], updates, strict=True):
            matrix = orthogonalized(update.flatten(1))
            outputs, inputs = matrix.shape
            kernel.add_(matrix.view_as(kernel), alpha=-group["lr"] * math.sqrt(max(1, outputs / inputs)))


def orthogonalized(matrix: torch.Tensor) -> torch.Tensor:
    """A matrix with the same singular vectors, all singular values near 1, by five steps of Newton and Schulz.

    On the matrix times its transpose, as fmbench does it.
    """
    if matrix.shape[0] > matrix.shape[1]:
        return orthogonalized(matrix.T).T
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix / (matrix.norm() + 1e-8)
    gram = x @ x.T
    product = torch.eye(len(x), dtype=x.dtype, device=x.device)
    for _ in range(5):
        factor = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal().add_(a)
        product = factor @ product
        gram = factor @ gram @ factor
    return product @ x


class KeepNorm:
    """Gives convolution kernels, after the step of their optimizer, the norms back that they began with."""

    @torch.no_grad()
    def __init__(self, kernels: list[torch.Tensor]):
        self.kernels = kernels
        self.norms = torch._foreach_norm(kernels)

    @torch.no_grad()
    def step(self) -> None:
        torch._foreach_mul_(self.kernels, torch._foreach_div(self.norms, torch._foreach_norm(self.kernels)))


def make_optimizers(model: nn.Module, settings: dict[str, Any], *, capturable: bool = False) -> list[Any]:
    """What takes a step each, in this order, in every update; `capturable` in CUDA graphs.

    Adam; SGD with weight decay on kernels; or Muon for the kernels of hidden layers, and Adam for the rest, with
    Nesterov's momentum both.
    """
    parameters = list(model.parameters())
    kernels = [p for p in parameters if p.ndim > 1]
    others = [p for p in parameters if p.ndim <= 1]
    rate, momentum, decay = settings["learning_rate"], settings["momentum"], settings["weight_decay"]
    betas = (settings["b1"], settings["b2"])
    optimizers: list[Any]
    match settings["name"]:
        case "adam":
            adam = {"betas": betas, "eps": settings["eps"], "fused": True, "capturable": capturable}
            optimizers = [torch.optim.Adam(parameters, rate, **adam)]
        case "sgd":
            groups = [{"params": kernels, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
            optimizers = [torch.optim.SGD(groups, rate, momentum, nesterov=settings["nesterov"], fused=True)]
        case "muon" if settings["nesterov"]:
            *hidden, head = kernels
            # With an infinite decay its momentum is b1 from the first step on, as in optax.
            nadam = {"lr": settings["adam_factor"] * rate, "betas": betas, "momentum_decay": math.inf}
            nadam["capturable"] = capturable
            optimizers = [Muon(hidden, rate, momentum, decay), torch.optim.NAdam([head, *others], **nadam)]
        case name:
            raise protocol.RefusalError(f"does not do this {name}: it has adam, sgd, and muon with nesterov")
    if settings["keep_norm"]:
        optimizers.append(KeepNorm([p for p in kernels if p.ndim == 4]))
    return optimizers


def canonical(model: nn.Module) -> dict[str, torch.Tensor]:
    """The model's own tensors by canonical path, shaped as in Flax."""
    named: dict[str, torch.Tensor] = {}
    for path, module in model.named_modules():
        match module:
            case nn.Conv2d():
                own = {"kernel": module.weight.permute(2, 3, 1, 0), "bias": module.bias}
            case nn.Linear():
                own = {"kernel": module.weight.T, "bias": module.bias}
            case nn.BatchNorm1d() | nn.BatchNorm2d():
                own = {
                    "scale": module.weight,
                    "bias": module.bias,
                    "mean": module.running_mean,
                    "var": module.running_var,
                }
            case _:
                own = {}
        named |= {f"{path}.{name}": tensor for name, tensor in own.items() if tensor is not None}
    return named


@torch.no_grad()
def set_weights(model: nn.Module, weights: dict[str, np.ndarray]) -> None:
    """Gives the model the canonical weights."""
    tensors = canonical(model)
    protocol.check_weights(weights, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    for name, tensor in tensors.items():
        tensor.copy_(torch.from_numpy(weights[name]))


if __name__ == "__main__":
    sys.exit(protocol.serve(PyTorch, sys.stdin, ANSWERS))
