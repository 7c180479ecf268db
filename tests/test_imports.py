"""Imports point down only, and importing the package loads nothing that it does not need yet."""

import ast
import os
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "hf_anomaly"

# From the bottom to the top; a module imports from its own part and from parts below.
LAYERS = [
    {"errors", "files", "names", "parsing", "version"},
    {"ops"},
    {"calibration", "cards", "untrusted"},
    {"saving"},
    {"hub"},
    {"detector"},
    {"backbones", "detectors"},
    {"image_processing", "data", "dissolving", "metrics", "visualization"},
    {"loading"},
    {"training"},
    {"demo", "report"},
    {"pipeline"},
    {"registry"},
    {"cli"},
    {"reproduction"},
]
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}
FAMILIES = {("dia", "csi")}  # a detector → the shared base of its family


def modules():
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def imported(path):
    """The modules of the package that a file imports anywhere in it, as tuples of names below hf_anomaly."""
    here = path.relative_to(ROOT).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            names = [(*base, alias.name) for alias in node.names]
        else:
            continue
        yield from (name[1:] for name in names if name[0] == "hf_anomaly")


def violations(path):
    own = path.relative_to(PACKAGE).with_suffix("").parts
    for target in imported(path):
        part = target[0] if target else ""
        if part not in LEVEL:
            yield f"imports {'.'.join(target)} from the package's front"
        elif part == own[0] == "detectors":
            if len(target) > 1 and target[1] != own[1] and (own[1], target[1]) not in FAMILIES:
                yield f"detector {own[1]} imports detector {target[1]}"
        elif part != own[0] and LEVEL[part] > LEVEL[own[0]]:
            yield f"imports {part}, which lies above"
        elif own[0] == "detectors" and part == "image_processing":
            yield "a detector imports the image processor"


def test_every_part_has_its_layer():
    assert {path.relative_to(PACKAGE).with_suffix("").parts[0] for path in modules()} <= set(LEVEL)


def test_imports_point_down():
    assert not {str(path.relative_to(PACKAGE)): found for path in modules() if (found := list(violations(path)))}


@pytest.mark.parametrize(
    ("file", "statement"),
    [
        ("ops/knn.py", "from ..detector import AnomalyDetector"),
        ("detectors/csi/modeling_csi.py", "from ..dia.modeling_dia import DIAModel"),
        ("detectors/csi/modeling_csi.py", "def f():\n    from hf_anomaly.data import prepare"),
        ("detectors/dia/modeling_dia.py", "import hf_anomaly.training"),
        ("calibration.py", "from . import detector"),
        ("detector.py", "from hf_anomaly import CSIModel"),
    ],
)
def test_the_check_sees_what_it_should(file, statement, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path / "hf_anomaly")
    path = tmp_path / "hf_anomaly" / file
    path.parent.mkdir(parents=True)
    path.write_text(statement)
    assert list(violations(path))


def test_no_module_uses_what_is_private_to_another():
    """Of another object, that is; a class may use its base's."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in modules()}
    defined = {
        path: {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name.startswith("_")}
        for path, tree in trees.items()
    }
    package = set().union(*defined.values())
    used = [
        f"{path.relative_to(PACKAGE)}:{node.lineno}: {ast.unparse(node)}"
        for path, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr in package - defined[path] and not node.attr.startswith("__")
        if ast.unparse(node.value) not in ("self", "cls", "super()")
    ]
    assert not used


def test_what_is_imported_is_declared():
    """Also where another dependency happens to bring it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    requirements = [*project["dependencies"], *chain.from_iterable(project["optional-dependencies"].values())]
    declared = {canonicalize_name(Requirement(requirement).name) for requirement in requirements}
    distributions = packages_distributions()
    imported = set()
    for node in chain.from_iterable(ast.walk(ast.parse(path.read_text(encoding="utf-8"))) for path in modules()):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            imported.add(node.module.partition(".")[0])
    undeclared = {
        name
        for name in imported - sys.stdlib_module_names - {"hf_anomaly"}
        if not declared & {canonicalize_name(distribution) for distribution in distributions.get(name, [name])}
    }
    assert not undeclared


def test_text_is_written_and_read_as_utf_8():
    """Not as the machine's locale has it, which on Windows is another encoding."""

    def opens_text(call):
        name = getattr(call.func, "attr", getattr(call.func, "id", None))
        modes = [value.value for value in call.args[1:2] if isinstance(value, ast.Constant)]
        return name in ("read_text", "write_text") or (ast.unparse(call.func) == "open" and not any("b" in mode for mode in modes))

    guessed = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in [*modules(), *(ROOT / "scripts").glob("*.py")]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and opens_text(node) and not any(keyword.arg == "encoding" for keyword in node.keywords)
    ]
    assert not guessed


HEAVY = {"diffusers", "datasets", "kornia", "evaluate", "sklearn", "gradio", "matplotlib", "pandas"}
LOADED = f"import sys; print(sorted({{name.split('.')[0] for name in sys.modules}} & {HEAVY}))"


def loaded_by(statement):
    result = subprocess.run([sys.executable, "-c", f"{statement}; {LOADED}"], check=True, capture_output=True, text=True)
    return set(ast.literal_eval(result.stdout.splitlines()[-1]))


def test_importing_the_package_stays_light():
    extra = loaded_by("import hf_anomaly.metrics; hf_anomaly.overlay_anomaly_map")
    if extra:  # transformers itself may import some of them where they are installed
        extra -= loaded_by("from transformers import AutoBackbone, AutoConfig, AutoImageProcessor, AutoModel, PreTrainedModel")
    assert not extra


def test_lazy_names_are_there():
    import hf_anomaly

    for name in hf_anomaly.__all__:
        assert getattr(hf_anomaly, name) is not None
    assert {*hf_anomaly.__all__, "__file__"} <= set(dir(hf_anomaly))
    assert not {"PurePath", "TYPE_CHECKING", "import_module", "os", "sys"} & set(dir(hf_anomaly))
    with pytest.raises(AttributeError, match="no attribute 'xyzzy'"):
        _ = hf_anomaly.xyzzy


def test_editors_and_type_checkers_see_the_lazy_names():
    """They read import statements, and of an installed package only where there is a py.typed."""
    import hf_anomaly

    assert (PACKAGE / "py.typed").is_file()
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    seen = next(node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    names = {alias.asname: node.module for node in seen.body for alias in node.names}
    assert names == hf_anomaly._HOMES


@pytest.mark.parametrize(("given", "then"), [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "PASSIVE"}, None)])
def test_threads_do_not_spin_long_unless_asked_to(given, then):
    environment = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    statement = "import os, sys; sys.argv[0] = 'hf-anomaly'; import hf_anomaly; print(os.environ.get('GOMP_SPINCOUNT'))"
    done = subprocess.run([sys.executable, "-c", statement], env=environment | given, check=True, capture_output=True, text=True)
    assert done.stdout == f"{then}\n"


def test_all_files_of_the_package_are_installed():
    """Not only in a checkout: setuptools takes packages, and of other files what is listed."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["hf_anomaly"]
    files = [path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert all((path.parent / "__init__.py").is_file() for path in files)
    others = [path for path in files if path.suffix != ".py"]
    assert others
    assert not [path for path in others if not any(path.relative_to(PACKAGE).match(pattern) for pattern in listed)]
