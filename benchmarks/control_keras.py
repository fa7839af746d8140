"""Reference systems in Keras 3 on TensorFlow, as their authors' code has them: `fit`, softmax, Keras's own Adam.

`control.py` says how it is spoken to. Epochs end with Keras's own smaller batch. A stage that augments draws its
batches from `ImageDataGenerator`, and has as many of them as batches are whole, as the reference has it.
"""

import sys

import control

if __name__ == "__main__":
    CONTROL = control.open_control()

from typing import Any

import keras
import numpy as np
import tensorflow as tf
from peer_keras import MODELS, make_optimizer

# The sigmoid outputs of cnn2, which Keras makes sum to one in its loss; `peer_keras` has their logarithms.
OUTPUTS = {"cnn2": "exponential"}


def run(told: control.Control) -> None:
    job = told.job
    keras.utils.set_random_seed(job.seed)
    inputs = keras.Input((28, 28, 1))
    logits = MODELS[job.model](inputs, **job.arguments)
    model = keras.Model(inputs, keras.layers.Activation(OUTPUTS.get(job.model, "softmax"))(logits))
    if job.model == "baseline":  # He's, but for the outputs
        for layer in (model.get_layer("conv1"), model.get_layer("dense1")):
            layer.kernel.assign(keras.initializers.HeUniform()(layer.kernel.shape))
    model.compile(
        optimizer=make_optimizer(job.optimizer), loss="sparse_categorical_crossentropy", metrics=["accuracy"]
    )
    versions = {"keras": keras.__version__, "tensorflow": tf.__version__, "numpy": np.__version__}
    told.tell(
        system=f"Keras {keras.__version__}, TensorFlow {tf.__version__}",
        versions=versions,
        num_params=model.count_params(),
    )

    def end_epoch(epoch: int, logs: dict[str, float]) -> None:
        told.tell(train_loss=logs["loss"], train_accuracy=logs["accuracy"], val_accuracy=logs.get("val_accuracy"))

    has_validation = "validation" in told.evaluated()
    validation = (told.images["validation"], told.labels["validation"]) if has_validation else None
    common: dict[str, Any] = {
        "validation_data": validation,
        "verbose": 0,
        "callbacks": [keras.callbacks.LambdaCallback(on_epoch_end=end_epoch)],
    }
    for number, stage in enumerate(job.stages, start=1):
        images, labels = told.images["train"], told.labels["train"]
        if any(stage["augment"].values()):
            model.fit(
                generator(stage["augment"]).flow(images, labels, batch_size=job.batch_size),
                steps_per_epoch=len(images) // job.batch_size,
                epochs=stage["num_epochs"],
                **common,
            )
        else:
            model.fit(images, labels, batch_size=job.batch_size, epochs=stage["num_epochs"], **common)
        told.end_stage(number, lambda images: model.predict(images, batch_size=1000, verbose=0).argmax(axis=-1))


def generator(augment: dict[str, Any]) -> Any:
    """Keras's own random rotations, shifts, shears and zooms; of other augmentations it has none."""
    known = {"rotation", "shift", "zoom", "shear"}
    if others := sorted(name for name, strength in augment.items() if strength and name not in known):
        raise ValueError(f"no {', '.join(others)} in ImageDataGenerator")
    return tf.keras.preprocessing.image.ImageDataGenerator(
        rotation_range=augment["rotation"],
        width_shift_range=augment["shift"],
        height_shift_range=augment["shift"],
        zoom_range=augment["zoom"],
        shear_range=augment["shear"],
    )


if __name__ == "__main__":
    run(CONTROL)
    CONTROL.write()
    sys.exit()
