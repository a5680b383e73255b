"""The architecture: who may import whom, what a run may load, and what is installed under which name."""

from __future__ import annotations

import ast
import importlib
import os
import pkgutil
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

import rt
from rt import errors

ROOT = Path(__file__).resolve().parents[1]
MAPPED = ("kernels", "export", "bench")
PACKAGES = ("rt", *(f"rt.{name}" for name in MAPPED))

# A module imports only from levels before its own. The first part of its name below `rt` says its level.
LEVELS = (
    "errors",
    "whole",
    "expression",
    "json_file",
    "checkpoint_file",
    "decode",
    "kernel_image",
    "shapes",
    "config",
    "model",
    "contract",
    "noise",
    "philox",
    "tokenizer",
    "images",
    "picture",
    "inpainting",
    "extras",
    "progress",
    "cuda",
    "samplers",
    "process",
    "processors",
    "backends",
    "machine",
    "bundle",
    "trajectory",
    "engines",
    "conditioning",
    "time_table",
    "step",
    "plan",
    "session",
    "device_loop",
    "device_session",
    "verify",
    "arguments",
    "timings",
    "pipeline",
    "sheet",
    "cli",
)
BUILD_ONLY = {
    "torch",
    "triton",
    "diffusers",
    "transformers",
    "onnx",
    "onnxscript",
    "onnx_ir",
    "accelerate",
    "huggingface_hub",
}
BACKEND_OF = {
    "openvino": "rt.backends.openvino_cpu",
    "onnxruntime": "rt.backends.ort",
    "cuda": "rt.cuda.driver",
}
RUNS_TORCH = "rt.backends.inductor"
"""The one part of a run that needs torch, and imports it when an engine loads."""


def sources() -> dict[str, Path]:
    """Every module of the distribution by its name."""
    found = {}
    for folder in ("rt", *MAPPED):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = [*path.relative_to(ROOT).with_suffix("").parts]
            name = ".".join(parts if folder == "rt" else ["rt", *parts])
            found[name.removesuffix(".__init__")] = path
    return found


SOURCES = sources()


def imports(module: str) -> Iterator[str]:
    """What a module imports anywhere in it, lazily or not, except for type checkers alone."""
    tree = ast.parse(SOURCES[module].read_text())
    for_types = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for statement in node.body
        for child in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in SOURCES else str(node.module)


def part(module: str) -> str:
    """`samplers` of `rt.samplers.ddim`; "" of `rt` itself."""
    return f"{module}..".split(".")[1]


def test_every_module_has_a_place():
    parts = {part(module) for module in SOURCES} - {"", "__main__", *MAPPED}
    assert parts == set(LEVELS)


@pytest.mark.parametrize("module", SOURCES)
def test_imports_point_downward(module):
    own = part(module)
    for imported in imports(module):
        other = part(imported)
        if imported.partition(".")[0] != "rt" or other == own:
            continue
        if other == "":  # `import rt` for the version alone
            assert own in ("cli", "bench"), f"{module} imports rt"
        elif own == "kernels":
            assert other in ("errors", "expression", "kernel_image", "extras"), f"{module} imports {imported}"
        elif own == "export":
            allowed = ("kernels", *LEVELS[: LEVELS.index("verify") + 1])
            assert other in allowed and other != "session", f"{module} imports {imported}"
        elif own == "bench":
            assert other in (*MAPPED, *LEVELS[:-1]), f"{module} imports {imported}"
        elif other == "bench":
            assert module == "rt.cli.bench", f"{module} imports {imported}"
        elif other == "export":
            assert module in ("rt.cli.build", "rt.cli.doctor"), f"{module} imports {imported}"
        elif own in ("", "__main__"):
            assert other in LEVELS
        else:
            assert LEVELS.index(other) < LEVELS.index(own), f"{module} imports {imported}"


@pytest.mark.parametrize("module", SOURCES)
def test_each_library_has_one_home(module):
    used = {name.partition(".")[0] for name in imports(module)}
    if part(module) not in ("export", "kernels", "bench"):
        assert not used & BUILD_ONLY - ({"torch"} if module == RUNS_TORCH else set())
    if part(module) != "bench":
        for library, home in BACKEND_OF.items():
            assert library not in used or module == home


@pytest.mark.parametrize("module", SOURCES)
def test_every_module_says_what_it_is(module):
    docstring = ast.get_docstring(ast.parse(SOURCES[module].read_text()))
    assert docstring and docstring.splitlines()[0].strip()


@pytest.mark.parametrize("module", [name for name in SOURCES if not name.endswith("__main__")])
def test_every_module_imports_and_keeps_its_promises(module):
    loaded = importlib.import_module(module)
    names = getattr(loaded, "__all__", [])
    assert list(names) == sorted(names, key=lambda name: (not name.isupper(), not name[0].isupper(), name))
    for name in names:
        getattr(loaded, name)


@pytest.mark.parametrize("name", MAPPED)
def test_mapped_packages_hold_a_docstring_and_no_more(name):
    """Other packages probe for a top-level `kernels`: ours must neither do anything nor raise."""
    assert len(ast.parse((ROOT / name / "__init__.py").read_text()).body) == 1


def pyproject() -> str:
    return (ROOT / "pyproject.toml").read_text()


def test_the_package_list_is_the_tree():
    listed = re.search(r"^packages = \[(.*?)\]", pyproject(), re.S | re.M)
    assert listed
    folders = {name for name, path in SOURCES.items() if path.name == "__init__.py"}
    assert sorted(re.findall(r'"([\w.]+)"', listed[1])) == sorted(folders)
    holding = {path.parent for path in SOURCES.values()}
    assert all((folder / "__init__.py").is_file() for folder in holding)


@pytest.fixture(scope="module")
def tracked() -> dict[Path, str]:
    """Every file that git keeps a version of, with the hash of its content."""
    listing = ["git", "-C", str(ROOT), "ls-files", "-z", "--stage"]
    try:
        listed = subprocess.run(listing, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this is no git checkout, or there is no git")
    entries = (entry.partition("\t") for entry in listed.split("\0") if entry)
    return {ROOT / name: facts.split()[1] for facts, _, name in entries if os.path.lexists(ROOT / name)}


def test_the_repository_travels(tracked):
    """It is cloned, copied to other machines, and kept whole in every checkout: 60 MiB are its end.

    History grows with each version of a file, so those of weights count once more each time they change.
    """
    sizes = {path.relative_to(ROOT).as_posix(): path.lstat().st_size for path in tracked}
    largest = sorted(sizes.items(), key=lambda entry: -entry[1])[:5]
    assert sum(sizes.values()) < 60 << 20, largest


def test_no_large_file_is_there_twice(tracked):
    """A folder that shares one with another has a link."""
    paths: dict[str, list[str]] = {}
    for path, content in tracked.items():
        if path.lstat().st_size > 256 << 10:
            paths.setdefault(content, []).append(str(path.relative_to(ROOT)))
    assert [twice for twice in paths.values() if len(twice) > 1] == []


def test_the_version_is_said_once_more_in_pyproject():
    version = re.search(r'^version = "(.+)"', pyproject(), re.M)
    assert version and version[1] == rt.__version__


def test_the_public_names():
    assert rt.__all__ == sorted(rt.__all__)
    assert dir(rt) == rt.__all__
    for name in rt.__all__:
        assert getattr(rt, name) is not None
    with pytest.raises(AttributeError, match="'rt' has no attribute 'pipeline_of_dreams'"):
        _ = rt.pipeline_of_dreams


def error_classes() -> list[type[errors.RtError]]:
    return [
        value
        for value in vars(errors).values()
        if isinstance(value, type) and issubclass(value, errors.RtError)
    ]


def test_the_tree_of_errors_is_complete():
    """Each class stands in the docstring, below its base, with its exit code."""
    lines = [line for line in (errors.__doc__ or "").splitlines() if re.search(r"\w*Error", line)]
    tree: dict[str, tuple[int, int, str]] = {}
    path: list[tuple[int, str]] = []
    for line in lines:
        entry = re.match(r"([ │├└─]*)(\w+Error)( \(\w+\))?\s+(\d+)\s", line)
        if not entry:
            continue
        indent = len(entry[1])
        path = [(i, name) for i, name in path if i < indent]
        tree[entry[2]] = (int(entry[4]), indent, path[-1][1] if path else "")
        path.append((indent, entry[2]))
    assert set(tree) == {cls.__name__ for cls in error_classes()}
    for cls in error_classes():
        code, _, parent = tree[cls.__name__]
        assert code == cls.exit_code
        assert parent == ("" if cls is errors.RtError else cls.__bases__[0].__name__)
        assert cls.__doc__


def python(code: str, *, cwd: Path, **environment: str) -> str:
    """What a fresh interpreter prints, started in `cwd` with nothing but what is installed."""
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env=clean | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_nothing_leaks_to_the_top_level(tmp_path):
    names = [*MAPPED, "tests"]
    code = "from importlib.util import find_spec as f; "
    code += f"print(*[bool(f(n)) for n in {names!r}], *[bool(f('rt.' + n)) for n in {list(MAPPED)!r}])"
    assert python(code, cwd=tmp_path).split() == ["False"] * 4 + ["True"] * 3


def test_import_rt_is_light(tmp_path):
    """The figure that counts is measured in bench; this bound is for machines that are busy."""
    code = "import sys, time; before = set(sys.modules); t = time.perf_counter(); import rt\n"
    code += "print(time.perf_counter() - t, *sorted(set(sys.modules) - before))"
    seconds, modules = [], set()
    for _ in range(5):
        first, *loaded = python(code, cwd=tmp_path).split()
        seconds.append(float(first))
        modules |= {name.partition(".")[0] for name in loaded}
    assert modules.isdisjoint(
        {"numpy", "click", "PIL", "tqdm", "tokenizers", "openvino", "onnxruntime", *BUILD_ONLY}
    )
    assert statistics.median(seconds) < 0.3


# Anything that is missing on a machine where bundles only run, and the network.
LEAN = """
import socket, sys

class Refuse:
    names = ("torch", "diffusers", "transformers", "onnx", "onnxscript", "scipy")
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"{name} is not here", name=name)

class NoSocket(socket.socket):
    def __init__(self, *arguments, **more):
        raise OSError("there is no network")

sys.meta_path.insert(0, Refuse())
socket.socket = NoSocket
"""


@pytest.mark.slow
def test_a_bundle_runs_without_torch_and_without_network(demo_bundle, tmp_path):
    code = f"""
import rt
pipe = rt.Pipeline.from_bundle({str(demo_bundle)!r})
image = pipe("a red heart", num_inference_steps=3, seed=1).images[0]
print(image.size, len(image.getcolors(1 << 20)) > 50, *sorted({{"torch", "diffusers"}} & set(sys.modules)))
"""
    assert python(LEAN + code, cwd=tmp_path).strip() == "(64, 64) True"


@pytest.mark.slow
def test_rt_run_without_torch_and_without_network(demo_bundle, tmp_path):
    arguments = ["rt", "run", str(demo_bundle), "-p", "a red heart", "--steps", "3", "-o", "heart.png", "-q"]
    code = f"import runpy; sys.argv = {arguments!r}; runpy.run_module('rt', run_name='__main__')"
    assert python(LEAN + code, cwd=tmp_path).strip() == "heart.png"
    assert (tmp_path / "heart.png").read_bytes().startswith(b"\x89PNG")


def test_the_walk_sees_what_is_installed():
    """The tests above walk files; the import system must see the same modules."""
    installed = set(PACKAGES)
    for package in PACKAGES:
        spec = find_spec(package)
        assert spec and spec.submodule_search_locations
        walked = pkgutil.walk_packages(spec.submodule_search_locations, f"{package}.")
        installed |= {module.name for module in walked if not module.name.startswith("rt._native")}
    assert installed == set(SOURCES)
