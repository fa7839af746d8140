"""How often the test behind the ranks is right: writes the tables of docs/measuring.md, in a minute or two.

    python tests/calibration.py

tests/records/test_calibration.py fails if they are not what this finds in the committed records.
"""

import itertools
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from scipy import stats

from fmbench.pages import generated, leaderboard
from fmbench.records import store
from fmbench.records.statistics import LEVEL, holm, recipe_difference

REPOSITORY = Path(__file__).parents[1]
PAGE = REPOSITORY / "docs" / "measuring.md"
MARKS = {name: (f"<!-- {name}: begin -->", f"<!-- {name}: end -->") for name in ("splits", "known", "simulated")}
NUM_CHOICES = 500  # of seeds, by chance, the same ones each time


def main() -> None:
    for name, lines in tables().items():
        generated.write(generated.between_marks(PAGE, MARKS[name], ["\n".join(lines)]))


def tables() -> dict[str, list[str]]:
    """The lines of each table by the name of its marks."""
    records = leaderboard.entries_by_condition(store.read_all(REPOSITORY / "results"))
    correct = {
        condition: {next(iter(runs.values())).entry: leaderboard.correct(runs) for runs in entries}
        for condition, entries in records.items()
    }
    return {"splits": splits(correct), "known": known(correct), "simulated": simulated()}


def images_only_p_value(correct_a: np.ndarray, correct_b: np.ndarray) -> float:
    """McNemar's test of shares of seeds: what comes of taking the seeds as the recipes."""
    difference = correct_a.mean(axis=0) - correct_b.mean(axis=0)
    norm = math.sqrt(np.square(difference).sum())
    return float(2 * stats.norm.sf(abs(difference.sum()) / norm)) if norm else 1.0


def chosen(*groups: tuple[np.ndarray, int]) -> Iterator[list[np.ndarray]]:
    """NUM_CHOICES times so many seeds of each recipe, by chance."""
    rng = np.random.default_rng(0)
    for _ in range(NUM_CHOICES):
        yield [seeds[rng.permutation(len(seeds))[:size]] for seeds, size in groups]


def splits(correct: dict) -> list[str]:
    """Seeds of one entry against other seeds of it: how often they are told apart."""
    lines = [
        "| entry | dtype | seeds | in groups of | told apart | with seeds taken as fixed |",
        "|:--|:--|--:|--:|--:|--:|",
    ]
    for condition, entries in correct.items():
        for entry, seeds in entries.items():
            for size in range(1, len(seeds) // 2 + 1):
                pairs = [np.split(both, 2) for (both,) in chosen((seeds, 2 * size))]
                ours = share(recipe_difference(a, b).p_value < LEVEL for a, b in pairs) if size > 1 else "no test"
                fixed = share(images_only_p_value(a, b) < LEVEL for a, b in pairs)
                lines.append(f"| {entry} | {condition.dtype} | {len(seeds)} | {size} | {ours} | {fixed} |")
    return lines


def known(correct: dict) -> list[str]:
    """Entries with seeds enough against each other, with all their seeds and with few of them."""
    sizes = (2, 3, 5)
    lines = [
        "| B - A | dtype | n | points | 95 % interval | p | p, corrected | "
        + " | ".join(f"found with {size}" for size in sizes)
        + " |",
        "|:--|:--|:--|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for condition, entries in correct.items():
        pairs = list(itertools.combinations([e for e, seeds in entries.items() if len(seeds) > 1], 2))
        differences = [recipe_difference(entries[a], entries[b]) for a, b in pairs]
        corrected = holm([difference.p_value for difference in differences])
        for (a, b), difference, p_value in zip(pairs, differences, corrected, strict=True):
            found = []
            for size in sizes:
                if size > min(len(entries[a]), len(entries[b])):
                    found.append("-")
                    continue
                groups = chosen((entries[a], size), (entries[b], size))
                found.append(share(recipe_difference(*both).p_value < LEVEL for both in groups))
            cells = [
                f"{b} - {a}",
                condition.dtype,
                f"{len(entries[a])}, {len(entries[b])}",
                f"{100 * difference.mean:+.2f}",
                f"{100 * difference.low:+.2f} to {100 * difference.high:+.2f}",
                *("< 0.0001" if p < 0.0001 else f"{p:.2g}" for p in (difference.p_value, p_value)),
                *found,
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def simulated(num_tables: int = 400) -> list[str]:
    """Four equal recipes: how often two of them are told apart, and how often any of a table's are."""
    lines = [
        "| std of seeds | of images | n | p < 0.05 | p < 0.01 | any of a table | with seeds taken as fixed |",
        "|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for of_seeds, of_images in itertools.product((0.0, 0.15), (0.0, 1.0)):
        rng = np.random.default_rng(0)
        many = draw(rng, 300, of_seeds, of_images)
        seeds_std = 100 * float(np.mean(many.mean(axis=2).std(axis=1)))
        images_std = 100 * float((many[0].mean(axis=0) - many[1].mean(axis=0)).std()) / math.sqrt(many.shape[2])
        for num_seeds in (2, 3, 5, 10):
            p_values, any_of_table, fixed = [], [], []
            for _ in range(num_tables):
                table = list(itertools.combinations(draw(rng, num_seeds, of_seeds, of_images), 2))
                p_values.append([recipe_difference(a, b).p_value for a, b in table])
                any_of_table.append(min(holm(p_values[-1])) < LEVEL)
                fixed += [images_only_p_value(a, b) < LEVEL for a, b in table]
            p = np.ravel(p_values)
            cells = [f"{seeds_std:.2f}", f"{images_std:.2f}" if of_images else "0", str(num_seeds)]
            cells += map(share, (p < 0.05, p < 0.01, any_of_table, fixed))
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def draw(rng: np.random.Generator, num_seeds: int, of_seeds: float, of_images: float) -> np.ndarray:
    """Whether four equally good recipes get each of 2,000 new images right, bool (4, num_seeds, 2,000).

    The log-odds of a right answer are the image's own, plus normal effects of seeds and of recipe and image.
    """
    image = 4.2 + 3 * rng.standard_normal(2000)
    recipe_and_image = of_images * rng.standard_normal((4, 1, 2000))
    seed = of_seeds * rng.standard_normal((4, num_seeds, 1))
    return rng.random((4, num_seeds, 2000)) < 1 / (1 + np.exp(-(image + recipe_and_image + seed)))


def share(found) -> str:
    return f"{100 * np.mean(list(found)):.1f} %"


if __name__ == "__main__":
    main()
