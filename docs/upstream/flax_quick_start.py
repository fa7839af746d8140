"""Flax on CPUs: a training step of the quick start's CNN takes longer than PyTorch's (google/flax#3551).

    pip install flax optax torch
    python flax_quick_start.py

The net of Flax's quick start: convolutions to 32 and 64 channels, each with ReLU and 2x2 average pooling, dense
layers of 256 and 10; batches of 32 images of 28x28, SGD with momentum. Prints the milliseconds of a step, of
whichever of the two frameworks is installed: the median of 400 after 50 that are not counted, and the fastest,
which other processes disturb least. The batch stays in memory, and nothing but steps is timed.
"""

import importlib.util
import os
import statistics
import time

import numpy as np

BATCH_SIZE = 32
LEARNING_RATE, MOMENTUM = 0.01, 0.9
NUM_WARM_UP, NUM_STEPS = 50, 400


def flax_step(images, labels):
    """What it is, and a step that returns when it is done."""
    import flax
    import jax
    import jaxlib
    import optax
    from flax import nnx

    class CNN(nnx.Module):
        def __init__(self, rngs):
            self.conv1 = nnx.Conv(1, 32, (3, 3), rngs=rngs)
            self.conv2 = nnx.Conv(32, 64, (3, 3), rngs=rngs)
            self.dense = nnx.Linear(7 * 7 * 64, 256, rngs=rngs)
            self.head = nnx.Linear(256, 10, rngs=rngs)

        def __call__(self, x):
            for conv in (self.conv1, self.conv2):
                x = nnx.avg_pool(nnx.relu(conv(x)), (2, 2), (2, 2))
            return self.head(nnx.relu(self.dense(x.reshape(len(x), -1))))

    graphdef, params = nnx.split(CNN(nnx.Rngs(0)))
    tx = optax.sgd(LEARNING_RATE, MOMENTUM)
    state = params, tx.init(params)

    @jax.jit
    def step(params, opt_state, images, labels):
        def loss_fn(params):
            logits = nnx.merge(graphdef, params)(images)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        updates, opt_state = tx.update(jax.grad(loss_fn)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    batch = jax.device_put((images, labels))

    def run():
        nonlocal state
        state = jax.block_until_ready(step(*state, *batch))

    return f"Flax {flax.__version__}, jax {jax.__version__}, jaxlib {jaxlib.__version__}", run


def torch_step(images, labels):
    import torch
    from torch import nn

    model = nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2)),
        *(nn.Flatten(), nn.Linear(7 * 7 * 64, 256), nn.ReLU(), nn.Linear(256, 10)),
    )
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, MOMENTUM)
    x, y = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels)

    def run():
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    return f"PyTorch {torch.__version__}", run


def measure(name, run):
    times = []
    for _ in range(NUM_WARM_UP + NUM_STEPS):
        start = time.perf_counter()
        run()
        times.append(1000 * (time.perf_counter() - start))
    times = times[NUM_WARM_UP:]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    print(
        f"{name}, {cores} cores: {statistics.median(times):.2f} ms a step (fastest {min(times):.2f})", flush=True
    )


if __name__ == "__main__":
    rng = np.random.default_rng(0)
    batch = rng.random((BATCH_SIZE, 28, 28, 1), np.float32), rng.integers(0, 10, BATCH_SIZE)
    for framework, make_step in {"flax": flax_step, "torch": torch_step}.items():
        if importlib.util.find_spec(framework):
            measure(*make_step(*batch))
        else:
            print(f"{framework} is not installed")
