"""The import rules, the documentation that runs, and what no file may hold."""

import ast
import doctest
import importlib
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import benchmarks
import kvcache
import sparse_attn

ROOT = Path(__file__).parent.parent
MAX_LINES = 600
CODE = (".py", ".cpp", ".h", ".cu", ".cuh")
# packages above, in the order that architecture section 5 draws: each may import itself and what stands to its left
LAYERS = {
    "sparse_attn": ["errors", "types", "ops", "patterns", "attention", "hf"],
    "kvcache": ["types", "budget", "policies", "config", "cache", "report", "hf"],
}
# what stores bytes and what ranks tokens never meet below cache.py
STRANGERS = [("kvcache.store", ("kvcache",)), ("kvcache.policies", ("kvcache.store", "kvcache.cache")),
             ("kvcache.budget", ("kvcache.store", "kvcache.policies")), ("kvcache.tiers", ("kvcache",))]
# a cycle on paper only: types take block geometry from ops.spans, which imports nothing of ours
LOWER = {"sparse_attn.ops.spans", "sparse_attn.ops.contract"}


def tracked() -> list[Path]:
    """Files of the repository, the untracked ones that git does not ignore included."""
    listed = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / line for line in listed.stdout.splitlines() if (ROOT / line).is_file()]


def sources() -> list[Path]:
    return [path for package in ("sparse_attn", "kvcache") for path in sorted((ROOT / package).rglob("*.py"))]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(code: str, module: str, is_package: bool) -> Iterator[str]:
    """Every module that ``code`` imports, anywhere in it, as an absolute name; ``from a import b`` gives ``a.b``."""
    package = module if is_package else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - (node.level - 1)]
                base = ".".join([*above, *filter(None, [node.module])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def inside(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def layer(module: str) -> int | None:
    """Place in LAYERS; None for modules that the drawing does not rank."""
    parts = module.split(".")
    known = LAYERS.get(parts[0], [])
    return known.index(parts[1]) if len(parts) > 1 and parts[1] in known else None


def broken_rules(module: str, imported: str) -> Iterator[str]:
    """Sentences for each rule of architecture section 5 that ``module`` breaks by importing ``imported``."""
    for package in ("benchmarks", "python_tests"):
        if inside(imported, package):
            yield f"{module} imports {imported}; nothing imports {package}"
    if module.startswith("sparse_attn") and inside(imported, "kvcache"):
        yield f"{module} imports {imported}; sparse_attn never knows kvcache"
    if inside(imported, "transformers") and module not in ("sparse_attn.hf", "kvcache.hf"):
        yield f"{module} imports {imported}; transformers appears only in hf.py"
    if inside(imported, "triton") and not inside(module, "sparse_attn.ops.triton"):
        yield f"{module} imports {imported}; triton appears only under ops/triton"
    if inside(module, "sparse_attn.ops"):
        # a reference and what it leans on
        torch_only = ("torch", "sparse_attn.ops", "sparse_attn.errors", "__future__")
        standard = imported.split(".")[0] in sys.stdlib_module_names
        if not standard and not any(inside(imported, name) for name in torch_only) and not inside(imported, "triton"):
            yield f"{module} imports {imported}; ops import torch, errors and their siblings"
    for one, others in STRANGERS:
        if inside(module, one) and any(inside(imported, other) for other in others) and not inside(imported, one):
            yield f"{module} imports {imported}; {one} does not know it"
    above, own = layer(imported), layer(module)
    same = imported.split(".")[0] == module.split(".")[0]
    if same and own is not None and above is not None and above > own and not any(inside(imported, low) for low in LOWER):
        yield f"{module} imports {imported}, which stands above it"


@pytest.mark.parametrize("path", sources(), ids=module_name)
def test_imports_point_one_way(path):
    found = imports(path.read_text(), module_name(path), path.name == "__init__.py")
    assert [sentence for name in found for sentence in broken_rules(module_name(path), name)] == []


@pytest.mark.parametrize(
    ("module", "code"),
    [
        ("sparse_attn.patterns.quest", "import transformers"),
        ("sparse_attn.ops.page_score", "def f():\n    from ..patterns import PATTERNS"),
        ("sparse_attn.ops.page_score", "import triton.language as tl"),
        ("sparse_attn.ops.page_score", "import einops"),
        ("sparse_attn.ops.page_score", "from ..types import BlockIndex"),
        ("sparse_attn.patterns.quest", "from .. import attention"),
        ("sparse_attn.patterns.quest", "from ..hf import patch"),
        ("sparse_attn.attention", "from . import hf"),
        ("sparse_attn.types", "from .ops import registry"),
        ("sparse_attn.attention", "import kvcache.store"),
        ("kvcache.store", "from benchmarks.measure import stamp"),
        ("kvcache.store", "from .types import Seen"),
        ("kvcache.policies.tova", "from ..store import Store"),
        ("kvcache.tiers.pool", "from ..types import Seen"),
        ("kvcache.types", "from .budget import Uniform"),
        ("kvcache.cache", "import transformers"),
        ("sparse_attn.config", "from python_tests import oracle"),
    ],
)
def test_each_import_rule_catches_its_breach(module, code):
    assert [s for name in imports(code, module, False) for s in broken_rules(module, name)]


def test_allowed_imports_pass():
    for module, code in [("sparse_attn.hf", "import transformers\nfrom .attention import sparse_attention"),
                         ("sparse_attn.types", "from .ops.spans import reach"),
                         ("kvcache.store", "from sparse_attn.types import KVView"),
                         ("sparse_attn.ops.triton.page_score", "import triton")]:
        assert [s for name in imports(code, module, False) for s in broken_rules(module, name)] == []


def modules() -> list[str]:
    """Every module of the three packages; a __main__ would run."""
    found = []
    for package in (sparse_attn, kvcache, benchmarks):
        if getattr(package, "__path__", None):
            found += [m.name for m in pkgutil.walk_packages(package.__path__, package.__name__ + ".")]
    return [name for name in found if not name.endswith("__main__") and "._native" not in name]


@pytest.mark.parametrize("name", modules())
def test_doctests_hold(name):
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and error.name.split(".")[0] in ("sparse_attn", "kvcache", "benchmarks"):
            raise
        pytest.skip(f"{name} needs {error.name}, which is not installed")
    assert doctest.testmod(module).failed == 0


def snippets(text: str) -> list[str]:
    """The ```python blocks of a README; one behind ``<!-- no-test -->`` is left out."""
    blocks = re.findall(r"^(<!-- no-test -->\n+)?```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [code for skipped, code in blocks if not skipped]


def test_snippets_are_found_and_skipped():
    text = "```python\na = 1\n```\n<!-- no-test -->\n```python\nb = 2\n```\n```sh\nls\n```\n```python\nc = 3\n```\n"
    assert snippets(text) == ["a = 1\n", "c = 3\n"]


def test_readme_snippets_run(tmp_path):
    blocks = snippets((ROOT / "README.md").read_text())
    assert blocks, "README.md has no python block to run"
    script = tmp_path / "readme.py"
    script.write_text("\n".join(blocks))
    environment_root = f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv = ['readme']; import runpy; "
    ran = subprocess.run([sys.executable, "-c", environment_root + f"runpy.run_path({str(script)!r})"], cwd=ROOT, capture_output=True,
                         text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-2000:]


# one pass over tokens x channels beside an attention that costs tokens x keys x channels: torch is quick enough
WITHOUT_KERNEL = {"merge_attention"}
# what a GPU does with pages of the host; a host does it with csrc/host
ON_A_GPU = {"gather_pages", "place_pages"}


def test_every_op_has_a_kernel_of_the_same_name():
    from sparse_attn.ops import OPS

    for name in OPS:
        assert (ROOT / "sparse_attn" / "ops" / f"{name}.py").exists(), name
        kernel = ROOT / "csrc" / ("cuda" if name in ON_A_GPU else "cpu") / f"{name}{'.cu' if name in ON_A_GPU else '.cpp'}"
        assert name in WITHOUT_KERNEL or kernel.exists(), f"{kernel.relative_to(ROOT)} is missing"


def test_no_file_is_too_long_to_read():
    long = {str(p.relative_to(ROOT)): n for p in tracked() if p.suffix in CODE and (n := len(p.read_text().splitlines())) > MAX_LINES}
    assert long == {}


def test_no_machine_path_is_written_down():
    # joined here so that this file does not hold what it looks for
    wanted = re.compile("|".join(["/" + folder + r"/\w" for folder in ("home", "root", "work", "Users", "opt")] + [re.escape(str(ROOT))]))
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}"
        for path in tracked()
        if path.suffix in (*CODE, ".md", ".toml", ".txt", ".json", ".jsonl", ".sh", "") and path.stat().st_size < 2**20
        for number, line in enumerate(path.read_text(errors="ignore").splitlines(), 1)
        if wanted.search(line)
    ]
    assert found == []


def test_the_license_is_whole():
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text and "END OF TERMS AND CONDITIONS" in text
