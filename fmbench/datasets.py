"""Prepares Fashion-MNIST if need be, proves it and shows what was proven; exports it.

The images come out of TensorFlow Datasets, without TensorFlow: a TFDS directory is prepared once
from the four official idx files, read once, and kept as memory-mapped arrays in a cache. Whichever
way the arrays came, they stand in the order of the idx files, and none is returned before its
SHA-256 is proven to be that of the official file: to train on MNIST digits or, unless it was asked
for by name, on the withdrawn first version of Fashion-MNIST is an error, not a surprising accuracy.

    python -m fmbench.datasets           prepares the data if need be and shows what was proven
    python -m fmbench.datasets export    writes it as CSV, idx or PNG files
"""

import functools

from fmbench.data import export, fashion_mnist
from fmbench.system import command_line, files


@command_line.plain_errors("datasets")
def main() -> None:
    parser = command_line.Parser(
        "datasets",
        description="Prepares Fashion-MNIST if need be, proves it and shows what was proven.",
    )
    parser.add_argument(
        "--data_dir",
        help="directory with the four idx files, or a TFDS data directory (default: "
        "$FMBENCH_DATA_DIR, else the cache, a prepared TFDS directory, the network)",
    )
    same_errors = functools.partial(command_line.Parser, "datasets")
    export.add_command(parser.add_subparsers(dest="command", parser_class=same_errors))  # type: ignore[call-overload]
    arguments = parser.parse_args()
    dataset = fashion_mnist.load(data_dir=arguments.data_dir)
    if arguments.command == "export":
        export.export(dataset, arguments.format, arguments.output)
        return
    cache = files.cache_directory() / dataset.version
    print(f"Fashion-MNIST {dataset.version}, every part proven by its SHA-256")
    print(f"cache         {cache}, made from {fashion_mnist.origin(cache)}")
    for field, part in fashion_mnist.PARTS.items():
        array = getattr(dataset, field)
        print(f"{field:<13} {array.dtype} {array.shape!s:<15} {dataset.sha256[part]}")


if __name__ == "__main__":
    main()
