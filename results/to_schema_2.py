"""Moves records of schema 1 to schema 2, which has the machine in a record's name.

    python results/to_schema_2.py results results/cross_validation

Renames <results_dir>/runs/mlp-cpu-float32-seed0.json (and .npy) to mlp-cpu-amd-epyc-2c-float32-seed0.json, and
says in it that it is of schema 2; not another byte changes. Where there is a record of that name, it stops.
"""

import sys
from pathlib import Path

from fmbench.records import store

OLD, NEW = b'"schema_version": 1,', b'"schema_version": 2,'


def move(results_dir: Path) -> int:
    """Moves what there is of schema 1, and says how many records that were."""
    moved = 0
    for path in sorted((results_dir / "runs").glob("*.json")):
        text = path.read_bytes()
        target = path.with_name(store.read(path).name)
        if text.count(OLD) != 1:
            continue
        if path.stem != target.name:
            if target.with_name(f"{target.name}.json").exists():
                sys.exit(f"{path}: {target.name}.json is there already; move one of them away.")
            if path.with_suffix(".npy").exists():
                path.with_suffix(".npy").rename(target.with_name(f"{target.name}.npy"))
        target.with_name(f"{target.name}.json").write_bytes(text.replace(OLD, NEW))
        if path.stem != target.name:
            path.unlink()
        moved += 1
    return moved


if __name__ == "__main__":
    for directory in map(Path, sys.argv[1:]):
        print(f"{directory}: moved {move(directory)} records")
