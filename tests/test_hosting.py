"""What the hosting site reads: it parses, and says what is so."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

REPOSITORY = Path(__file__).parents[1]
FORMS = sorted((REPOSITORY / ".github" / "ISSUE_TEMPLATE").glob("[!c]*.yml"))
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
# Of GitHub's form schema: what an element must and may have.
ATTRIBUTES = {
    "markdown": ({"value"}, set()),
    "textarea": ({"label"}, {"description", "placeholder", "value", "render"}),
    "dropdown": ({"label", "options"}, {"description", "multiple", "default"}),
}


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_issue_forms_are_of_the_form_schema(path):
    form = yaml.safe_load(path.read_text())
    assert {"name", "description", "body"} <= form.keys() <= {"name", "description", "body", "labels", "title"}
    ids = [element["id"] for element in form["body"] if element["type"] != "markdown"]
    assert len(set(ids)) == len(ids) > 0
    for element in form["body"]:
        must, may = ATTRIBUTES[element["type"]]
        assert element.keys() <= {"type", "id", "attributes", "validations"}
        assert must <= element["attributes"].keys() <= must | may


def test_the_workflow_runs_what_there_is_with_pinned_actions():
    workflow = yaml.safe_load((REPOSITORY / ".github/workflows/ci.yml").read_text())
    assert workflow["permissions"] == {"contents": "read"}
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    used = [step["uses"] for step in steps if "uses" in step]
    assert all(re.fullmatch(r"actions/[\w-]+@[0-9a-f]{40}", action) for action in used)
    scripts = [script for step in steps for script in re.findall(r"bash (\S+)", step.get("run", ""))]
    assert scripts == [".ci/run", ".ci/submission"]
    versions = [
        step["with"]["python-version"].split() for step in steps if "python-version" in step.get("with", {})
    ]
    known = [one.rpartition(" :: ")[2] for one in PROJECT["classifiers"] if ":: Python ::" in one]
    assert versions[0] == [known[0], known[-1]]
    for script in scripts:
        subprocess.run(["bash", "-n", REPOSITORY / script], check=True)


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    assert (citation["version"], citation["license"]) == (PROJECT["version"], PROJECT["license"])
    assert [author["name"] for author in citation["authors"]] == [author["name"] for author in PROJECT["authors"]]


def test_ci_says_that_no_record_is_new_and_refuses_what_is_no_commit(tmp_path):
    done = subprocess.run(
        ["bash", REPOSITORY / ".ci/submission", "HEAD"], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout[:23]) == (0, "No record is new since ")
    done = subprocess.run(["bash", REPOSITORY / ".ci/submission", "--help"], capture_output=True, text=True)
    assert done.returncode not in (0, 1)
