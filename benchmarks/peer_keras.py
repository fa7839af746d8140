"""Keras 3 on TensorFlow, for `python -m fmbench.benchmark`: the same nets as an expert of Keras runs them.

Functional models, and one `tf.function` for a step: faster than `train_on_batch`, which does more around it.
"""

import protocol

if __name__ == "__main__":
    ANSWERS = protocol.claim_stdout()

import functools
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf
from keras import layers

# On CPUs TensorFlow's own kernels, oneDNN's, beat XLA's: on two cores cnn4 and vgg_like train 4 to 9 times faster.
JIT_COMPILE = False


def mlp(x: Any) -> Any:
    x = layers.Flatten()(x)
    for number, (units, rate) in enumerate([(256, 0.4), (512, 0.4), (100, 0.5)], start=1):
        x = layers.Dense(units, name=f"dense{number}")(x)
        x = layers.LeakyReLU(negative_slope=0.3)(x)
        x = layers.Dropout(rate)(x)
    return layers.Dense(10, name="head")(x)


def fully_connected(x: Any, widths: Sequence[int], num_dropouts: int) -> Any:
    x = layers.Flatten()(x)
    for number, units in enumerate(widths):
        x = layers.Dense(units, activation="relu", name=f"hidden.{number}")(x)
        if number < num_dropouts:
            x = layers.Dropout(0.25)(x)
    return layers.Dense(10, name="head")(x)


def baseline(x: Any, filters: int = 32, padding: str = "VALID") -> Any:
    x = layers.Conv2D(filters, 3, padding=padding.lower(), activation="relu", name="conv1")(x)
    x = layers.MaxPooling2D(2)(x)
    x = layers.Flatten()(x)
    x = layers.Dense(100, activation="relu", name="dense1")(x)
    return layers.Dense(10, name="head")(x)


def cnn1(x: Any) -> Any:
    x = layers.Conv2D(32, 3, activation="relu", name="conv1")(x)
    x = layers.MaxPooling2D(2)(x)
    x = layers.Dropout(0.2)(x)
    x = layers.Flatten()(x)
    x = layers.Dense(128, activation="relu", name="dense1")(x)
    return layers.Dense(10, name="head")(x)


def cnn2(x: Any) -> Any:
    x = layers.Conv2D(64, 3, activation="relu", name="conv1")(x)
    x = layers.MaxPooling2D(2)(x)
    x = layers.Dropout(0.25)(x)
    x = layers.Conv2D(32, 3, activation="relu", name="conv2")(x)
    x = layers.MaxPooling2D(2)(x)
    x = layers.Flatten()(x)
    x = layers.Dense(32, activation="relu", name="dense1")(x)
    return layers.Dense(10, activation="log_sigmoid", name="head")(x)


def cnn3(x: Any) -> Any:
    x = layers.Conv2D(32, 3, activation="relu", name="conv1")(x)
    x = layers.MaxPooling2D(2)(x)
    x = layers.Dropout(0.25)(x)
    x = layers.Conv2D(64, 3, activation="relu", name="conv2")(x)
    x = layers.MaxPooling2D(2)(x)
    x = layers.Dropout(0.25)(x)
    x = layers.Conv2D(128, 3, activation="relu", name="conv3")(x)
    x = layers.Dropout(0.4)(x)
    x = layers.Flatten()(x)
    x = layers.Dense(128, activation="relu", name="dense1")(x)
    x = layers.Dropout(0.3)(x)
    return layers.Dense(10, name="head")(x)


def cnn4(x: Any) -> Any:
    def norm(number: int) -> layers.Layer:
        return layers.BatchNormalization(momentum=0.99, epsilon=1e-3, name=f"norm{number}")

    x = layers.Conv2D(32, 3, activation="relu", name="conv1")(x)
    x = norm(1)(x)
    x = layers.Conv2D(32, 3, activation="relu", name="conv2")(x)
    x = norm(2)(x)
    x = layers.MaxPooling2D(2)(x)
    x = layers.Dropout(0.25)(x)
    x = layers.Conv2D(64, 3, activation="relu", name="conv3")(x)
    x = norm(3)(x)
    x = layers.Dropout(0.25)(x)
    x = layers.Conv2D(128, 3, activation="relu", name="conv4")(x)
    x = norm(4)(x)
    x = layers.MaxPooling2D(2)(x)
    x = layers.Dropout(0.25)(x)
    x = layers.Flatten()(x)
    x = layers.Dense(512, activation="relu", name="dense1")(x)
    x = norm(5)(x)
    x = layers.Dropout(0.5)(x)
    x = layers.Dense(128, activation="relu", name="dense2")(x)
    x = norm(6)(x)
    x = layers.Dropout(0.5)(x)
    return layers.Dense(10, name="head")(x)


def vgg_like(x: Any) -> Any:
    x = layers.Conv2D(32, 3, padding="same", activation="relu", name="conv1")(x)
    x = layers.Conv2D(64, 3, padding="same", activation="relu", name="conv2")(x)
    x = layers.MaxPooling2D(2)(x)
    x = layers.Dropout(0.5)(x)
    x = layers.Conv2D(128, 3, padding="same", activation="relu", name="conv3")(x)
    x = layers.Conv2D(256, 3, activation="relu", name="conv4")(x)
    x = layers.MaxPooling2D(3)(x)
    x = layers.Dropout(0.5)(x)
    x = layers.Flatten()(x)
    x = layers.Dense(256, name="dense1")(x)
    x = layers.LeakyReLU(negative_slope=0.3)(x)
    x = layers.Dropout(0.5)(x)
    x = layers.Dense(256, name="dense2")(x)
    x = layers.LeakyReLU(negative_slope=0.3)(x)
    return layers.Dense(10, name="head")(x)


def resnet(x: Any, depth: int = 20) -> Any:
    def conv(outputs: int, name: str, strides: int = 1) -> layers.Layer:
        return layers.Conv2D(outputs, 3, strides=strides, padding="same", use_bias=False, name=name)

    def norm(name: str) -> layers.Layer:
        return layers.BatchNormalization(momentum=0.9, epsilon=1e-5, name=name)

    x = norm("stem_norm")(conv(16, "stem")(x))
    x = layers.ReLU()(x)
    inputs, number = 16, 0
    for outputs in (16, 32, 64):
        for _ in range((depth - 2) // 6):
            strides = 1 if inputs == outputs else 2
            y = conv(outputs, f"blocks.{number}.conv1", strides)(x)
            y = layers.ReLU()(norm(f"blocks.{number}.norm1")(y))
            y = conv(outputs, f"blocks.{number}.conv2")(y)
            y = norm(f"blocks.{number}.norm2")(y)
            if strides > 1:  # option A: subsample, and fill the new channels with zeros
                x = keras.ops.pad(x[:, ::2, ::2], [(0, 0), (0, 0), (0, 0), (0, outputs - inputs)])
            x = layers.ReLU()(layers.Add()([y, x]))
            inputs = outputs
            number += 1
    x = layers.GlobalAveragePooling2D()(x)
    return layers.Dense(10, name="head")(x)


MODELS: dict[str, Callable[..., Any]] = {
    "mlp": mlp,
    "fully_connected": fully_connected,
    "baseline": baseline,
    "cnn1": cnn1,
    "cnn2": cnn2,
    "cnn3": cnn3,
    "cnn4": cnn4,
    "vgg_like": vgg_like,
    "resnet": resnet,
}


class Keras:
    """A net with its optimizer and its data."""

    def __init__(self, job: protocol.Job):
        job.check_variant("float32", "bfloat16")
        job.check_step()
        keras.utils.set_random_seed(protocol.SEED)
        keras.mixed_precision.set_dtype_policy("mixed_bfloat16" if job.dtype == "bfloat16" else "float32")
        self.job = job
        images, labels = job.load_rows()
        self.images, self.labels = tf.constant(images), tf.constant(labels)
        self.train_batches = protocol.shuffled_batches(len(images), job.batch_size)
        self.infer_batches = functools.cache(functools.partial(protocol.consecutive_batches, len(images)))

        inputs = keras.Input((28, 28, 1))
        self.model = keras.Model(inputs, MODELS[job.model](inputs, **job.arguments))
        weights = job.load_weights()
        if weights is not None:
            set_weights(self.model, weights)
        self.optimizer = make_optimizer(job.optimizer)
        self.optimizer.build(self.model.trainable_variables)
        # SGD's weight decay is added to the gradient; Keras's own would be decoupled from it.
        self.weight_decay = job.optimizer["weight_decay"] if job.optimizer["name"] == "sgd" else 0.0

        policy = ", mixed_bfloat16" if job.dtype == "bfloat16" else ""
        self.name = f"Keras {keras.__version__}, TensorFlow {tf.__version__}{policy}"
        self.versions = {"keras": keras.__version__, "tensorflow": tf.__version__}
        self.num_params = sum(int(np.prod(v.shape)) for v in self.model.weights)
        self.bytes_per_image: float | None = None
        self.num_trainable_params = sum(int(np.prod(v.shape)) for v in self.model.trainable_weights)

    def forward(self, images: tf.Tensor, training: bool) -> tf.Tensor:
        scale, shift = protocol.normalization_constants(self.job.normalization)
        x = tf.cast(tf.reshape(images, (-1, 28, 28, 1)), tf.float32) * scale + shift
        return tf.cast(self.model(x, training=training), tf.float32)

    def train(self, indices: tf.Tensor) -> tf.Tensor:
        """One update."""
        images, labels = tf.gather(self.images, indices), tf.gather(self.labels, indices)
        with tf.GradientTape() as tape:
            logits = self.forward(images, training=True)
            loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits))
        variables = self.model.trainable_variables
        grads = tape.gradient(loss, [variable.value for variable in variables])
        if self.weight_decay:
            grads = [
                grad + self.weight_decay * variable.value if len(variable.shape) > 1 else grad
                for grad, variable in zip(grads, variables, strict=True)
            ]
        self.optimizer.apply(grads, variables)
        return loss

    def infer(self, indices: tf.Tensor) -> tf.Tensor:
        return tf.argmax(self.forward(tf.gather(self.images, indices), training=False), axis=-1)

    def logits(self, count: int) -> np.ndarray:
        return self.forward(self.images[:count], training=False).numpy()

    def compile(self) -> None:
        def program(step: Any, batch_size: int) -> Any:
            signature = [tf.TensorSpec((batch_size,), tf.int32)]
            return tf.function(step, input_signature=signature, jit_compile=JIT_COMPILE)

        self.train_program = program(self.train, self.job.batch_size)
        self.infer_program = functools.cache(functools.partial(program, self.infer))  # by batch size
        self.train_step()
        self.infer_step(self.job.infer_batch_size)

    def train_step(self) -> tuple[int, Any]:
        return self.job.batch_size, self.train_program(next(self.train_batches))

    def infer_step(self, batch_size: int) -> tuple[int, Any]:
        return batch_size, self.infer_program(batch_size)(next(self.infer_batches(batch_size)))

    def peak_memory_bytes(self) -> int:
        return protocol.process_peak_memory_bytes()

    def wait(self, started: tf.Tensor) -> None:
        started.numpy()


def make_optimizer(settings: dict[str, Any]) -> keras.optimizers.Optimizer:
    """SGD, whose weight decay the step adds, or Adam."""
    match settings["name"]:
        case "adam":
            return keras.optimizers.Adam(
                settings["learning_rate"], settings["b1"], settings["b2"], settings["eps"]
            )
        case "sgd":
            return keras.optimizers.SGD(settings["learning_rate"], settings["momentum"], settings["nesterov"])
    raise protocol.RefusalError(f"does not do {settings['name']}: it has adam and sgd")


# Flax's names of what Keras calls otherwise.
_CANONICAL_NAMES = {"gamma": "scale", "beta": "bias", "moving_mean": "mean", "moving_variance": "var"}


def set_weights(model: keras.Model, weights: dict[str, np.ndarray]) -> None:
    """Gives the model the canonical weights, which have the shapes of Keras."""
    variables = {
        f"{layer.name}.{_CANONICAL_NAMES.get(variable.name, variable.name)}": variable
        for layer in model.layers
        for variable in layer.weights
    }
    protocol.check_weights(weights, {name: tuple(variable.shape) for name, variable in variables.items()})
    for name, variable in variables.items():
        variable.assign(weights[name])


if __name__ == "__main__":
    sys.exit(protocol.serve(Keras, sys.stdin, ANSWERS))
