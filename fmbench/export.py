"""Writes a trained model in a form that others read: safetensors, StableHLO or ONNX.

    fmbench export --model=workdirs/mlp-cpu-float32-seed0 --format=safetensors --output=mlp
    fmbench export --model=workdirs/mlp-cpu-float32-seed0 --format=stablehlo --output=mlp-stablehlo
    fmbench export --model=workdirs/mlp-cpu-float32-seed0 --format=onnx --output=mlp-onnx

--output is a new folder, complete or not there. Beside the model it has the run's record and a README.md, a model
card with evaluation results as Hugging Face reads them. StableHLO and ONNX take grey levels, uint8 (n, 28, 28) of
any n, normalise them themselves and return logits; both are run from their files on all test images first, and
compared with the model and with the predictions in the record.

safetensors and ONNX need pip install 'fmbench[export]'.

Exit codes: 0 done, 1 written, but some predictions are not those in the record, 2 something given cannot be used.
"""

import sys
from pathlib import Path

from fmbench.exchange import folder
from fmbench.system import command_line, runtime


@command_line.plain_errors("export")
def main() -> None:
    parser = command_line.Parser("export", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, metavar="WORKDIR", help="of a completed run")
    parser.add_argument("--format", choices=sorted(folder.FILES), required=True)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="a new folder")
    parser.add_argument("--force", action="store_true", help="replace an export that is there")
    arguments = parser.parse_args()
    runtime.set_up()
    comparison = folder.export(arguments.model, arguments.format, arguments.output, force=arguments.force)
    print(comparison or "Every bit of the weights is that of the trained model.")
    print(f"{arguments.output}: {', '.join(sorted(path.name for path in arguments.output.iterdir()))}")
    sys.exit(1 if comparison and comparison.differing else 0)


if __name__ == "__main__":
    main()
