"""What a release says of itself agrees: version, changelog, citation, and the README as PyPI shows it."""

import re
import tomllib
from pathlib import Path

import pytest

import flax_local_attention

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
REPOSITORY = PROJECT["project"]["urls"]["Repository"]
VERSION = flax_local_attention.__version__
HOOK = PROJECT["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]


def shown_on_pypi(text):
    """Text of the README after the substitutions of the build."""
    for substitution in HOOK["substitutions"]:
        text = re.sub(substitution["pattern"], substitution["replacement"], text)
    return text.replace("$HFPR_VERSION", VERSION)


def test_changelog_and_citation_name_the_version_and_its_date():
    newest = re.search(r"^## \[(.+)\] - (\d{4}-\d\d-\d\d)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    citation = (ROOT / "CITATION.cff").read_text()
    assert newest[1] == VERSION
    assert f"\nversion: {VERSION}\n" in citation
    assert f'\ndate-released: "{newest[2]}"\n' in citation


def test_the_citation_names_the_project_as_the_package_does():
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nrepository-code: {REPOSITORY}\n" in citation
    assert f"\nurl: {PROJECT['project']['urls']['Documentation']}\n" in citation
    assert f"  - name: {PROJECT['project']['authors'][0]['name']}\n" in citation
    assert f"\nlicense: {PROJECT['project']['license']}\n" in citation


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("[x](docs/a.md#b)", f"[x]({REPOSITORY}/blob/v{VERSION}/docs/a.md#b)"),
        ("[x](#b)", f"[x]({REPOSITORY}/blob/v{VERSION}/README.md#b)"),
        ("[x](https://jax.dev)", "[x](https://jax.dev)"),
        ("[![x](a.svg)](b)", f"[![x]({{raw}}a.svg)]({REPOSITORY}/blob/v{VERSION}/b)"),
        ('<img src="a.svg">', '<img src="{raw}a.svg">'),
        ('<source srcset="a.svg">', '<source srcset="{raw}a.svg">'),
        ('<a href="docs/a.md">', f'<a href="{REPOSITORY}/blob/v{VERSION}/docs/a.md">'),
    ],
)
def test_links_of_the_readme_lead_to_this_version(written, shown):
    raw = REPOSITORY.replace("github.com", "raw.githubusercontent.com") + f"/v{VERSION}/"
    assert shown_on_pypi(written) == shown.replace("{raw}", raw)


def test_every_link_of_the_readme_works_on_pypi():
    readme = (ROOT / "README.md").read_text()
    shown = shown_on_pypi(readme)
    targets = re.findall(r'(?:\]\(|\b(?:src|srcset|href)=")([^)"\s]+)', shown)
    assert targets
    assert not [target for target in targets if not target.startswith("https://")]
    ours = re.findall(rf"/flax-local-attention/(?:blob/)?v{re.escape(VERSION)}/([^)\"#\s]+)", shown)
    assert not [path for path in ours if not (ROOT / path).exists()]
    assert re.findall(r"```.*?```", shown, re.DOTALL) == re.findall(r"```.*?```", readme, re.DOTALL)
