"""The tables of docs/measuring.md are what the committed records and the simulation give."""

import calibration
import pytest

from fmbench.pages import generated


@pytest.mark.slow
def test_the_tables_of_the_page_are_what_the_records_give():
    for name, lines in calibration.tables().items():
        expected = generated.between_marks(calibration.PAGE, calibration.MARKS[name], ["\n".join(lines)])
        assert expected, f"{name}: the page has no marks"
        assert not generated.stale(expected), f"{name}: run python tests/calibration.py"
