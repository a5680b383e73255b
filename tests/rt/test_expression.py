import pytest

from rt.errors import ConfigError
from rt.expression import evaluate
from rt.kernel_image import KernelImage, TensorArgument


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7", 7),
        ("a * cdiv(b, 4)", 9),
        ("(a + b) // 2 - 1", 5),
        ("min(a, b) + max(a, 5)", 8),
        ("cdiv(8, 4)", 2),
    ],
)
def test_a_formula_has_a_value(text: str, value: int) -> None:
    assert evaluate(text, {"a": 3, "b": 10}) == value


@pytest.mark.parametrize(
    "text",
    [
        *("c", "a / 2", "a.real", "True", "1.5", "min(a, key=b)", "__import__('os')", "[a]", "a b", ""),
        *("\0", "a // 0", "cdiv(1)", "(" * 10**5, "+".join("a" * 10**5)),
    ],
)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        evaluate(text, {"a": 3, "b": 10})


def test_other_kinds_of_numbers_pass_through() -> None:
    ceiling = {"cdiv": lambda a, b: f"ceil({a}/{b})"}
    assert evaluate("cdiv(x, 2)", {"x": "n"}, ceiling) == "ceil(n/2)"


def image(**changes: object) -> KernelImage:
    fields: dict[str, object] = {
        "kernel": "double",
        "name": "double-float16-sm90",
        "symbol": "double",
        "capability": 86,
        "file": "kernels/double.cubin",
        "sizes": {"width": 8},
        "constants": {"BLOCK": 128, "eps": 1e-5, "silu": True},
        "inputs": (TensorArgument(name="x", shape=("rows", "width"), dtype="float16"),),
        "scalars": {"elements": "rows * width"},
        "outputs": (TensorArgument(name="y", shape=("rows * 2", "width"), dtype="float16"),),
        "grid": ("cdiv(rows * width, BLOCK)",),
        "threads": 128,
        "shared_bytes": 0,
        "registers": 32,
    }
    return KernelImage(**{**fields, **changes})  # type: ignore[arg-type]


def test_an_image_says_how_it_is_launched() -> None:
    it = image()
    assert it.launch_grid({"rows": 33}) == (3, 1, 1)
    assert it.scalar_values({"rows": 33}) == [264]
    assert it.outputs[0].extent({"rows": 33, "width": 8}) == (66, 8)
    assert KernelImage.from_json(it.to_json()) == it


@pytest.mark.parametrize(("capability", "runs"), [(80, False), (86, True), (89, True), (90, False)])
def test_an_image_runs_on_its_major_version_upwards(capability: int, runs: bool) -> None:
    assert image().runs_on(capability) is runs
