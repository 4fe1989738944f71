"""The rooms of the project: what may be imported where, and README's snippets."""

import ast
import re
import shutil
import sys

import pytest
from helpers import ROOT, run_python
from PIL import Image

TABLE = re.findall(
    r"^\| `(\w+)\.py` \|.*\| (.*?) ?\|$",
    (ROOT / "CONTRIBUTING.md").read_text("utf-8"),
    re.MULTILINE,
)
ROOMS = {name: {*row.split(", ")} - {""} for name, row in TABLE}  # what each file imports of ours
COMMANDS = {"train", "predict", "check"}  # paper/ may name their paths, and imports none of them


def imported(path):
    """The modules that a file imports, at its top and within functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return {name.split(".")[0] for name in names}


def sources(folder):
    return [p for p in sorted(folder.glob("*.py")) if not p.name.startswith("test_")]


def test_the_table_of_rooms_tells_what_each_imports():
    assert {path.stem for path in sources(ROOT)} == ROOMS.keys()
    seen = set()
    for name, row in ROOMS.items():
        assert imported(ROOT / f"{name}.py") & {*ROOMS, "paper"} == row, name
        assert row <= seen, f"{name} imports a room below it"
        seen.add(name)


def test_paper_imports_no_command():
    for path in sources(ROOT / "paper"):
        assert not imported(path) & COMMANDS, path.name


def test_three_packages_are_all_that_is_needed():
    """Nothing is compiled, and no package is imported but those of requirements.txt."""
    files = sources(ROOT) + sources(ROOT / "paper")
    own = {p.stem for p in files} | {"paper"}
    assert set().union(*map(imported, files)) - sys.stdlib_module_names - own == {
        "torch",
        "numpy",
        "PIL",
    }
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert [re.match("[a-z]+", line)[0] for line in lines] == ["torch", "numpy", "pillow", "pytest"]
    compiled = (".c", ".cpp", ".cu", ".pyx", ".so")
    for folder in (ROOT, ROOT / "paper"):
        assert not [p for p in folder.iterdir() if p.suffix in compiled]


def test_each_test_that_the_docs_name_exists():
    sources = [*ROOT.glob("test_*.py"), *ROOT.glob("tests/*.py"), *ROOT.glob("paper/test_*.py")]
    defined = set(re.findall(r"^def (test_\w+)", "\n".join(p.read_text() for p in sources), re.M))
    for page in (ROOT / "docs" / "reliability.md", ROOT / "docs" / "gpu.md", ROOT / "README.md"):
        named = set(re.findall(r"`(test_\w+)`", page.read_text(encoding="utf-8")))
        assert named <= defined, named - defined


def readme_snippet(name):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    snippets = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    return dict(zip(("block", "fcn", "unet", "export", "onnx", "mask"), snippets, strict=True))[
        name
    ]


@pytest.mark.parametrize(
    "name", ["block", "fcn", "unet", pytest.param("export", marks=pytest.mark.slow)]
)
def test_readme_snippets_run_beside_dnl_alone(name, tmp_path):
    snippet = readme_snippet(name)
    shutil.copy(ROOT / "dnl.py", tmp_path)
    if "torchvision" in snippet and run_python("import torchvision", tmp_path).returncode:
        pytest.skip("torchvision is not there, or does not fit this torch")
    done = run_python(snippet, tmp_path)
    assert done.returncode == 0, done.stderr


def test_readmes_lines_from_an_image_to_a_mask(run_folder, street, tmp_path):
    shutil.copy(run_folder / "best.pt", tmp_path)
    with Image.open(street / "images" / "val" / "0.png") as image:
        image.save(tmp_path / "photo.jpg")
        size = image.size
    path = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
    done = run_python(path + readme_snippet("mask"), tmp_path)
    assert done.returncode == 0, done.stderr
    assert all(line.endswith("% of the image") for line in done.stdout.splitlines())
    with Image.open(tmp_path / "mask.png") as mask:
        assert mask.size == size and mask.mode == "P"


@pytest.mark.slow
def test_readmes_onnx_file_is_the_network(tmp_path):
    """README's lines, then onnxruntime against eager at three sizes and two batches."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    shutil.copy(ROOT / "dnl.py", tmp_path)
    compare = """
for size in ((17, 17), (65, 130), (320, 480)):
    for batch in (1, 8):
        image = torch.randn(batch, 3, *size)
        onnx = torch.from_numpy(session.run(None, {"image": image.numpy()})[0])
        torch.testing.assert_close(onnx, net(image), atol=1e-4, rtol=0)
"""
    export = readme_snippet("export").replace(
        "free = ", "torch.nn.init.ones_(net.context.gamma)\nfree = "
    )
    done = run_python(export + readme_snippet("onnx") + compare, tmp_path)
    assert done.returncode == 0, done.stderr
