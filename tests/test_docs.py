"""The code of README and of every page of docs/ runs as it stands."""

import ast
import re
import textwrap
from importlib import util
from pathlib import Path

import pytest

import flax_local_attention

ROOT = Path(__file__).parent.parent
FENCE = re.compile(r"^( *)```python(?: [^\n]*)?\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)


def python_blocks(text):
    """Yield the code of each block, those inside tabs and admonitions too, and the lines of the page before it."""
    for block in FENCE.finditer(text):
        yield textwrap.dedent(block[2]), text.count("\n", 0, block.start(2))


def lacks_peer(code):
    """Whether code imports PyTorch or the original and they are not installed."""
    nodes = list(ast.walk(ast.parse(code)))
    modules = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    return any(util.find_spec(peer) is None for peer in modules & {"torch", "local_attention"})


def test_a_block_is_left_out_only_for_a_peer_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(util, "find_spec", lambda name: None)
    assert lacks_peer("import torch")
    assert lacks_peer("from local_attention import LocalAttention")
    assert not lacks_peer("from flax_local_attention import local_attention")


def pages_with_code():
    pages = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
    return [str(page.relative_to(ROOT)) for page in pages if "```python" in page.read_text()]


def test_blocks_are_found_wherever_they_stand():
    page = '```python\na = 1\n```\n\n=== "tab"\n\n    ```python\n    b = a\n\n    c = b\n    ```\n\n```py\nd\n```\n'
    assert list(python_blocks(page)) == [("a = 1\n", 1), ("b = a\n\nc = b\n", 7)]


@pytest.mark.parametrize("page", pages_with_code())
@pytest.mark.usefixtures("quick_compile")
def test_every_block_runs_after_those_above_it(page):
    text = (ROOT / page).read_text()
    blocks = list(python_blocks(text))
    assert len(blocks) == text.count("```python"), "a block has no end, or one that is indented otherwise"
    names = {}
    for code, lines_before in blocks:
        if lacks_peer(code):
            continue
        # Blank lines before the code give errors the line of the page.
        exec(compile("\n" * lines_before + code, str(ROOT / page), "exec"), names)


def test_the_pages_of_the_api_have_every_public_name_once():
    pages = "".join(page.read_text() for page in sorted((ROOT / "docs/api").glob("*.md")))
    shown = re.findall(r"^::: flax_local_attention\.(\w+)$", pages, re.MULTILINE)
    assert sorted(shown) == sorted(flax_local_attention.__all__)
