"""The table of results that timm keeps (results/results-imagenet.csv): a row for each set of weights."""

import csv
import io
from collections.abc import Sequence

from fmbench.records.schema import RunRecord

HEADER = "model,top1,top1_err,top5,top5_err,param_count,img_size,crop_pct,interpolation\n"


def render(records: Sequence[RunRecord]) -> str:
    """A row for each record, in timm's order: the best first.

    Accuracies are in percent, parameters in millions, without running statistics, as timm counts. Images are
    neither cropped nor resized.
    """
    rows = [(100 * (run.test_accuracy or 0), 100 * (run.test_top5_accuracy or 0), run) for run in records]
    rows.sort(key=lambda row: (-row[0], -row[1], row[2].name))
    text = io.StringIO()
    text.write(HEADER)
    writer = csv.writer(text, lineterminator="\n")
    for top1, top5, run in rows:
        top5_cells = [f"{top5:.3f}", f"{100 - top5:.3f}"] if run.test_top5_accuracy is not None else ["", ""]
        parameters = f"{run.num_trainable_params / 1e6:,.2f}"
        cells = [f"{top1:.3f}", f"{100 - top1:.3f}", *top5_cells, parameters, 28, "1.000", "none"]
        writer.writerow([run.name, *cells])
    return text.getvalue()
