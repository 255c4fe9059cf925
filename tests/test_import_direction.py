"""One direction of imports, no cycle: every module has a rank and imports from lower ranks alone.

Read from the source with ast, so imports inside functions count too.  A new module gets a place in ``RANKS``;
``python tests/test_import_direction.py`` prints the lowest rank that each module can have.
"""

import ast
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("utils", "benchmarks", "examples", "tvm_benchmark", "zoo")

# Rank -> modules, ``/`` in front of those outside utils/.  A package itself (its empty __init__) has no rank.
RANKS: tuple[str, ...] = (
    """/tvm_benchmark.memory /tvm_benchmark.script /tvm_benchmark.timing errors flag_kinds hawq.arithmetic
    hawq.names integer_graph.ir metrics quantization_utils.backends quantization_utils.cost_model
    quantization_utils.dyadic quantization_utils.fold_bn quantization_utils.least_squares
    quantization_utils.observers quantization_utils.published_ptq quantization_utils.quant_primitives
    quantization_utils.windows seeded tables /zoo.transfer""",
    """/bit_config /tvm_benchmark.isa /tvm_benchmark.layout /tvm_benchmark.runtime atomic_file distillation
    image_sources integer_graph.reference integer_graph.torch_rescale integer_graph.type_rules preprocess
    quantization_utils.bit_width_problem quantization_utils.capture quantization_utils.quant_modules
    quantization_utils.range_search quantization_utils.scheme_report run_log torch_file /zoo.archive /zoo.drive
    /zoo.recipes""",
    """/tvm_benchmark.artifact /tvm_benchmark.machine_peak /tvm_benchmark.plan /tvm_benchmark.source checkpoint
    digits_net doctor.document hawq.files integer_graph.converted integer_graph.exact_conv
    integer_graph.float_islands plots provenance quantization_utils.adaround quantization_utils.bit_width_search
    quantization_utils.calibrators quantization_utils.float_ops quantization_utils.tensor_cache run_report
    search_flags transforms /zoo.manifest""",
    """/benchmarks.readme_tables /tvm_benchmark.halo /tvm_benchmark.loops /tvm_benchmark.report
    /tvm_benchmark.vectors data_utils float_weights hawq.parameters hawq.schemes integer_graph.ops
    integer_graph.torch_steps layer_latency quantization_utils.blocks quantization_utils.coded
    quantization_utils.float_joins quantization_utils.ptq_recipe quantization_utils.rows search_report /zoo.listing
    /zoo.store""",
    """/tvm_benchmark.inputs /tvm_benchmark.movement /tvm_benchmark.peers /tvm_benchmark.pointwise
    integer_graph.input_table integer_graph.interpreter integer_graph.movement integer_graph.serialize models
    quantization_utils.float_pools quantization_utils.ilp_tables /zoo.flag""",
    """/benchmarks.bit_width_search /tvm_benchmark.epilogue /tvm_benchmark.layers hawq.builder integer_graph.diff
    integer_graph.info integer_graph.predict integer_graph.torch_engine quantization_utils.float_rows
    quantization_utils.layer_costs""",
    """/tvm_benchmark.depthwise_bytes /tvm_benchmark.elementwise /tvm_benchmark.equality /tvm_benchmark.pools
    /tvm_benchmark.walks hawq.networks integer_graph.__main__ quantization_utils.float_graph""",
    """/tvm_benchmark.dense /tvm_benchmark.depthwise hawq.fitting quantization_utils.prepare""",
    """/tvm_benchmark.registers /tvm_benchmark.tiles doctor.observe evaluation hawq.graph integer_graph.from_torch
    quantization_utils.calibrate quantization_utils.equalize quantization_utils.execution
    quantization_utils.side_by_side quantization_utils.simulate quantization_utils.single_layer
    quantization_utils.state quantization_utils.training quantization_utils.weight_ranges /zoo.table""",
    """/benchmarks.qat_step /tvm_benchmark.convolution experiment quantization_utils.bias_correction
    quantization_utils.channel_groups quantization_utils.output_scales quantization_utils.quantization_errors
    quantization_utils.sensitivity_loss quantization_utils.sensitivity_state quantization_utils.sqnr run_data
    train_flags trainer""",
    """/tvm_benchmark.lowering api doctor.outcomes flag_checks quantization_utils.channel_statistics
    quantization_utils.hessian_trace quantization_utils.reconstruction_fit random_networks run_state""",
    """/benchmarks.calibration_cost /benchmarks.engine_speed /benchmarks.equality /benchmarks.families
    /examples.own_model /tvm_benchmark.subject /tvm_benchmark.tune doctor.trials quantization_utils.affine
    quantization_utils.balance quantization_utils.reconstruction_state quantization_utils.row_fit
    quantization_utils.sensitivity_images /zoo.runs""",
    """/tvm_benchmark.compile doctor.examine quantization_utils.ptq quantization_utils.reconstruct
    quantization_utils.sensitivity""",
    """/benchmarks.search_effect /benchmarks.sensitivity_cost /benchmarks.tvm_equality /benchmarks.tvm_memory
    /tvm_benchmark.layer_latency /tvm_benchmark.validate calibration_run doctor.advice search_run""",
    """/tvm_benchmark.benchmark doctor.report graph_evaluation quantization_utils.board_network""",
    """/benchmarks.tvm_latency doctor.command hawq.__main__ hawq_run quantization_utils.ptq_board /zoo.kinds""",
    """/quant_train""",
    """/benchmarks.accuracy /examples.demo /zoo.record /zoo.verify""",
    """/benchmarks.ptq /zoo.train""",
    """/zoo.__main__""",
)

# Modules that must work where torch is not installed: the definition of correct, and what is shipped.
NUMPY_ONLY = (
    "utils.errors",
    "utils.quantization_utils.dyadic",
    "utils.integer_graph.ir",
    "utils.integer_graph.type_rules",
    "utils.integer_graph.reference",
    "utils.integer_graph.ops",
    "utils.integer_graph.float_islands",
    "utils.integer_graph.exact_conv",
    "utils.integer_graph.movement",
    "utils.integer_graph.interpreter",
    "utils.integer_graph.serialize",
    "utils.integer_graph.diff",
    "utils.integer_graph.info",
    "tvm_benchmark.artifact",
    "tvm_benchmark.compile",
)

# Package -> the only modules (or folders) that may import it.
ONLY_IN = {
    "tvm": ("tvm_benchmark",),
    "onnx": ("utils.integer_graph.to_onnx", "utils.integer_graph.onnx_", "tvm_benchmark.peers"),
    "onnxruntime": ("utils.integer_graph.onnx_", "benchmarks", "tvm_benchmark.peers"),
    "openvino": ("benchmarks", "tvm_benchmark.peers"),
    "nncf": ("benchmarks", "tvm_benchmark.peers"),
    "tensorboard": ("utils.run_state",),
    "matplotlib": ("utils.plots",),
    "sklearn": ("utils.image_sources",),
    "scipy": ("utils.quantization_utils.bit_width_search",),
    "safetensors": ("utils.integer_graph.serialize",),
    "gdown": ("utils.models", "zoo"),
    "pytorchcv": ("utils.models",),
}
OPTIONAL = ("tvm", "tvm_benchmark.", "onnx", "onnxruntime", "openvino", "nncf", "torch.utils.tensorboard", "gdown")
MAX_FUNCTION, MAX_FILE = 60, 480


@cache
def modules() -> dict[str, Path]:
    """Dotted name -> file of every module of the project, tests left out."""
    files = [*ROOT.glob("*.py"), *(file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py"))]
    return {".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): f for f in files}


@cache
def ranks() -> dict[str, int]:
    names = {name: rank for rank, line in enumerate(RANKS) for name in line.split()}
    return {name[1:] if name.startswith("/") else f"utils.{name}": rank for name, rank in names.items()}


@cache
def tree(name: str) -> ast.Module:
    return ast.parse(modules()[name].read_text())


def imports_of(statements: Iterator[ast.AST]) -> Iterator[str]:
    """Dotted names that import statements name: ``from a import b`` gives a.b where that is a module, else a."""
    for node in statements:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in modules() else str(node.module)


@cache
def imports(name: str) -> frozenset[str]:
    return frozenset(imports_of(ast.walk(tree(name))))


def internal(name: str) -> set[str]:
    """Modules of the project that ``name`` imports, packages left out: their __init__ is empty."""
    return {found for found in imports(name) if found in modules() and not is_package(found)}


def is_package(name: str) -> bool:
    return modules()[name].name == "__init__.py"


@cache
def lowest_rank(name: str) -> int:
    return max((lowest_rank(found) + 1 for found in internal(name)), default=0)


def functions(name: str) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(tree(name)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


EVERY = pytest.mark.parametrize("name", sorted(modules()))


def test_ranks_name_existing_modules_once() -> None:
    named = [name for line in RANKS for name in line.split()]
    assert len(named) == len(set(named))
    assert set(ranks()) <= set(modules()), f"no such modules: {set(ranks()) - set(modules())}"


@EVERY
def test_imports_lower_ranks_only(name: str) -> None:
    if is_package(name):
        assert not tree(name).body or ast.get_docstring(tree(name)), f"{name}/__init__.py must stay empty"
        assert not imports(name)
        return
    assert name in ranks(), f"give {name} a rank in RANKS, at least {lowest_rank(name)}"
    found = {other: ranks().get(other) for other in internal(name)}
    wrong = {other: rank for other, rank in found.items() if rank is not None and rank >= ranks()[name]}
    assert not wrong, f"{name} has rank {ranks()[name]} and imports {wrong}; it needs at least {lowest_rank(name)}"


@EVERY
def test_no_star_import_and_nothing_of_torch_ao(name: str) -> None:
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.ImportFrom):
            assert all(alias.name != "*" for alias in node.names), f"{name} has a star import"
        if isinstance(node, ast.Attribute):
            assert ast.unparse(node) != "torch.ao", f"{name} uses torch.ao"
    used = {found for found in imports(name) if (found + ".").startswith(("torch.ao.", "torch.quantization."))}
    assert not used


@EVERY
def test_heavy_packages_stay_where_they_belong(name: str) -> None:
    for found in imports(name):
        allowed = ONLY_IN.get("tensorboard" if "tensorboard" in found else found.split(".")[0])
        assert allowed is None or name.startswith(allowed), f"{name} imports {found}, which belongs in {allowed}"


@EVERY
def test_only_optional_packages_are_imported_inside_functions(name: str) -> None:
    inside = {found for function in functions(name) for found in imports_of(ast.walk(function))}
    wrong = {found for found in inside if not found.startswith(OPTIONAL)}
    assert not wrong, f"{name} imports {wrong} inside a function"


@EVERY
def test_functions_and_files_stay_small(name: str) -> None:
    lines = len(modules()[name].read_text().splitlines())
    assert lines <= MAX_FILE, f"{name} has {lines} lines"
    for function in functions(name):
        first = function.body[0]
        body = function.end_lineno - function.lineno + 1  # type: ignore[operator]
        if ast.get_docstring(function) is not None:
            body -= first.end_lineno - first.lineno + 1  # type: ignore[operator]
        assert body <= MAX_FUNCTION, f"{name}.{function.name} has {body} lines"


@EVERY
def test_public_functions_of_utils_have_docstrings(name: str) -> None:
    if not name.startswith("utils"):
        return
    top = [node for node in tree(name).body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    named = [node for node in top if not node.name.startswith("_") and not is_overload(node)]
    missing = [node.name for node in named if ast.get_docstring(node) is None]
    assert not missing, f"{name}: no docstring for {missing}"


def is_overload(node: ast.FunctionDef | ast.ClassDef) -> bool:
    return any(ast.unparse(decorator) == "overload" for decorator in node.decorator_list)


def test_integers_work_without_torch() -> None:
    """Imports the numpy side in a process where importing torch fails."""
    code = "import sys; sys.modules['torch'] = None\n" + "".join(f"import {name}\n" for name in NUMPY_ONLY)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def _print_lowest_ranks() -> None:
    names = [name for name in modules() if not is_package(name)]
    for rank in range(max(map(lowest_rank, names)) + 1):
        found = sorted(name for name in names if lowest_rank(name) == rank)
        shown = [name.removeprefix("utils.") if name.startswith("utils.") else f"/{name}" for name in found]
        print(textwrap.fill(f'"""{" ".join(shown)}""",', 115, initial_indent="    ", subsequent_indent="    "))


if __name__ == "__main__":
    _print_lowest_ranks()
