"""The rooms of the project: what may be imported where, and README's snippets."""

import ast
import re
import shutil
import sys

import pytest
from helpers import ROOT, run_python


def test_three_packages_are_all_that_is_needed():
    """Promise: nothing compiled, no package but those of requirements.txt. Imports within functions count too."""
    files = [
        p for p in (*ROOT.glob("*.py"), *ROOT.glob("paper/*.py")) if not p.name.startswith("test_")
    ]
    nodes = [node for p in files for node in ast.walk(ast.parse(p.read_text(encoding="utf-8")))]
    names = {a.name for node in nodes if isinstance(node, ast.Import) for a in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    own = {p.stem for p in files} | {"paper"}
    assert {n.split(".")[0] for n in names} - sys.stdlib_module_names - own == {
        "torch",
        "numpy",
        "PIL",
    }
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert [re.match("[a-z]+", line)[0] for line in lines] == ["torch", "numpy", "pillow", "pytest"]
    assert not [
        p
        for top in (ROOT, ROOT / "paper")
        for p in top.iterdir()
        if p.suffix in (".c", ".cpp", ".cu", ".pyx", ".so")
    ]


@pytest.mark.parametrize(
    "name", ["block", "fcn", "unet", pytest.param("export", marks=pytest.mark.slow)]
)
def test_readme_snippets_run_beside_dnl_alone(name, tmp_path):
    snippets = re.findall(
        r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL
    )
    snippet = dict(zip(("block", "fcn", "unet", "export"), snippets, strict=True))[name]
    shutil.copy(ROOT / "dnl.py", tmp_path)
    if "torchvision" in snippet and run_python("import torchvision", tmp_path).returncode:
        pytest.skip("torchvision is not there, or does not fit this torch")
    done = run_python(snippet, tmp_path)
    assert done.returncode == 0, done.stderr
