"""What somebody outside of fmbench might write: models, optimizers, schedules and augmentations, good and bad.

Tests name them by import path, 'outside:Little'; tests/ is on the path of the whole suite.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx


class Little(nnx.Module):
    """A hidden layer, and a last one that is not called head."""

    def __init__(self, *, width=8, rngs, dtype=jnp.float32, axis_name=None):
        self.hidden = nnx.Linear(784, width, dtype=dtype, rngs=rngs)
        self.last = nnx.Linear(width, 10, dtype=dtype, rngs=rngs)

    def __call__(self, images, *, train=False, rngs=None):
        return self.last(nnx.relu(self.hidden(images.reshape(len(images), -1))))


class TakesNoAxisName(Little):
    def __init__(self, *, rngs, dtype):
        super().__init__(rngs=rngs, dtype=dtype)


class NeedsMore(Little):
    def __init__(self, *, depth, rngs, dtype, axis_name):
        super().__init__(rngs=rngs, dtype=dtype)


class FailsToBuild(Little):
    def __init__(self, *, rngs, dtype, axis_name):
        self.hidden = nnx.Linear(784, -1, rngs=rngs)  # line of FailsToBuild


class TakesNoTrain(Little):
    def __call__(self, images):  # type: ignore[override]
        return super().__call__(images)


class TakesNoImages(Little):
    def __call__(self, *, train=False, rngs=None):  # type: ignore[override]
        return jnp.zeros((2, 10))


class IsNotCalled(nnx.Module):
    def __init__(self, *, rngs, dtype, axis_name):
        pass


class FailsInTraining(Little):
    def __call__(self, images, *, train=False, rngs=None):
        return self.hidden(images) if train else super().__call__(images)  # line of FailsInTraining


class ReturnsOneNumber(Little):
    def __call__(self, images, *, train=False, rngs=None):
        return super().__call__(images).sum(axis=-1)


class ReturnsClasses(Little):
    def __call__(self, images, *, train=False, rngs=None):
        return super().__call__(images).astype(jnp.int32)


class ReturnsTwo(Little):
    def __call__(self, images, *, train=False, rngs=None):
        return super().__call__(images), None


def momentum(learning_rate, *, momentum, beta=0.5):
    return optax.sgd(lambda step: beta * learning_rate(step), momentum)


def takes_no_rate(rate):
    return optax.sgd(rate)


def returns_no_optimizer(learning_rate):
    return learning_rate


def fails(learning_rate, num_steps=0, steps_per_epoch=0):
    raise RuntimeError("boom")  # line of fails


def triangle(learning_rate, num_steps, steps_per_epoch, warmup_epochs, floor=0.0):
    rise = optax.linear_schedule(floor, learning_rate, round(warmup_epochs * steps_per_epoch))
    return lambda step: rise(step) + 0.0 * num_steps


def takes_the_rate_alone(learning_rate):
    return optax.constant_schedule(learning_rate)


def returns_no_schedule(learning_rate, num_steps, steps_per_epoch):
    return learning_rate


def returns_two_rates(learning_rate, num_steps, steps_per_epoch):
    return lambda step: jnp.zeros(2)


def noise(key, image):
    return image + jax.random.uniform(key, image.shape)


def invert(key, image):
    return 255 - image


def upper_half(key, image):
    return image[:14]


def to_integers(key, image):
    return image.astype(jnp.uint8)


def takes_an_image_alone(image):
    return image


def fails_on_images(key, image):
    return image @ jnp.zeros(3)  # line of fails_on_images


A_NUMBER = 3
