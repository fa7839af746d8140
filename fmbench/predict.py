"""Classifies images with an exported model.

    python -m fmbench.predict --model=workdirs/mlp-cpu-float32-seed0 shirt.png boots.jpg

Images of any size are reduced to grey 28 x 28; like the data set's they should show a light article on a black
background.
"""

import argparse
import json
import sys
from pathlib import Path

import jax
import numpy as np
import PIL.Image
from flax import nnx

from fmbench import checkpoint, input_pipeline
from fmbench.errors import UserError


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m fmbench.predict",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", type=Path, required=True, help="work directory or exported model")
    parser.add_argument("--json", action="store_true", help="one JSON object per image")
    parser.add_argument("images", nargs="+", type=Path, metavar="image")
    arguments = parser.parse_args()
    try:
        model, description = checkpoint.load_model(arguments.model)
    except UserError as error:
        print(f"fmbench.predict: {error}", file=sys.stderr)
        sys.exit(2)

    failed = False
    for path in arguments.images:
        try:
            pixels = read_image(path)
        except UserError as error:
            print(f"fmbench.predict: {error}", file=sys.stderr)
            failed = True
            continue
        prediction = predict(model, description, pixels)
        if arguments.json:
            print(json.dumps({"path": str(path)} | prediction))
        else:
            top3 = ", ".join(f"{name} {probability:.1%}" for name, probability in prediction["top3"])
            print(f"{path}: {top3}")
    sys.exit(1 if failed else 0)


def read_image(path: Path) -> np.ndarray:
    """Reads an image as grey levels, uint8 (28, 28).

    Raises:
        UserError: If the file is missing or no image.
    """
    try:
        with PIL.Image.open(path) as image:
            if image.mode.startswith("I"):  # 16 bits, which `convert` would cut off at 255
                grey = PIL.Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
            else:
                grey = image.convert("L")
            return np.asarray(grey.resize((28, 28), PIL.Image.Resampling.LANCZOS))
    except (OSError, ValueError, PIL.Image.DecompressionBombError) as error:
        raise UserError(f"{path}: cannot read it as an image ({error}).") from error


def predict(model: nnx.Module, description: dict, pixels: np.ndarray) -> dict:
    """Label, class, probability and the three likeliest classes of one image, uint8 (28, 28)."""
    images = input_pipeline.normalize(pixels.reshape(1, 784), description["normalization"])
    probabilities = np.asarray(jax.nn.softmax(model(images).astype("float32")))[0]
    names = description["class_names"]
    ranking = [int(label) for label in np.argsort(-probabilities)]
    return {
        "label": ranking[0],
        "class": names[ranking[0]],
        "probability": float(probabilities[ranking[0]]),
        "top3": [(names[label], float(probabilities[label])) for label in ranking[:3]],
    }


if __name__ == "__main__":
    main()
