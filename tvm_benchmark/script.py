"""Builds a TIR module from the subset of TVMScript that kernels are written in, several times faster than TVM's parser.

TVM's parser evaluates each operand of each expression on its own.  Here the text is rewritten once, statement by
statement, into calls of TVM's builder, and run as one Python program.  The modules are equal node by node.
"""

import ast
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any


class _Statements(ast.NodeTransformer):
    """Statements of a function's body become calls of the builder ``B``; expressions stay as they are."""

    def visit_For(self, node: ast.For) -> ast.stmt:
        """``for i in T.serial(n)`` -> ``with T.serial(n) as i: B.name("i", i)``."""
        assert isinstance(node.target, ast.Name)
        named = _call("name", ast.Constant(node.target.id), ast.Name(node.target.id, ast.Load()))
        body = [ast.Expr(named), *map(self.visit, node.body)]
        return ast.With([ast.withitem(node.iter, node.target)], body)

    def visit_If(self, node: ast.If) -> ast.stmt:
        """``if c: ... else: ...`` -> ``with B.when(c): with T.Then(): ...; with T.Else(): ...``."""
        branches = [("Then", node.body), ("Else", node.orelse)]
        body = [_with(_tirx(name), list(map(self.visit, lines))) for name, lines in branches if lines]
        return _with(_call("when", node.test), body)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.stmt:
        """``v: T.let = x`` -> ``v = B.let("v", x)``."""
        assert isinstance(node.target, ast.Name)
        assert node.value is not None
        return ast.Assign([node.target], _call("let", ast.Constant(node.target.id), node.value))

    def visit_Assign(self, node: ast.Assign) -> ast.stmt:
        """``p[i] = x`` -> ``T.buffer_store(p, x, i)``, ``b = T.alloc_buffer(...)`` -> ``b = B.name("b", ...)``."""
        target = node.targets[0]
        if isinstance(target, ast.Subscript):
            return ast.Expr(_tirx("buffer_store", target.value, node.value, target.slice))
        assert isinstance(target, ast.Name)
        return ast.Assign([target], _call("name", ast.Constant(target.id), node.value))

    def visit_Return(self, node: ast.Return) -> ast.stmt:
        assert node.value is not None
        return ast.Expr(_tirx("Return", node.value))


def _attribute(owner: str, name: str) -> ast.expr:
    return ast.Attribute(ast.Name(owner, ast.Load()), name, ast.Load())


def _call(name: str, *arguments: ast.expr) -> ast.expr:
    return ast.Call(_attribute("B", name), list(arguments), [])


def _tirx(name: str, *arguments: ast.expr) -> ast.expr:
    return ast.Call(_attribute("T", name), list(arguments), [])


def _with(context: ast.expr, body: list[ast.stmt]) -> ast.stmt:
    return ast.With([ast.withitem(context)], body)


def _signature(function: ast.FunctionDef) -> ast.stmt:
    """``def f(a: A) -> R`` -> ``B.declare("f", {"a": A}, R)``."""
    keys: list[ast.expr | None] = [ast.Constant(arg.arg) for arg in function.args.args]
    types = ast.Dict(keys, [arg.annotation for arg in function.args.args if arg.annotation])
    return ast.Expr(_call("declare", ast.Constant(function.name), types, function.returns or ast.Constant(None)))


def _definition(function: ast.FunctionDef) -> ast.stmt:
    """The body, where the builder has the function's frame open and gives its parameters."""
    decorator = function.decorator_list[0]
    assert isinstance(decorator, ast.Call)
    context = ast.Call(_attribute("B", "function"), [ast.Constant(function.name)], decorator.keywords)
    names: list[ast.expr] = [ast.Name(arg.arg, ast.Store()) for arg in function.args.args]
    body = list(map(_Statements().visit, function.body))
    return ast.With([ast.withitem(context, ast.List(names, ast.Store()))], body)


class _Builder:
    """What a rewritten text calls beside ``T``; ``functions`` holds what its functions are called by."""

    def __init__(self, tvm: Any, tirx: Any, builder: Any, declare: Any):
        self.tvm, self.tirx, self.builder, self.declare_function = tvm, tirx, builder, declare
        self.functions = SimpleNamespace()
        self.signatures: dict[str, tuple[dict[str, Any], Any]] = {}

    def name(self, name: str, value: Any) -> Any:
        self.builder.name(name, value)
        return value

    def let(self, name: str, value: Any) -> Any:
        if not isinstance(value, self.tvm.ir.Expr):
            value = self.tvm.tirx.const(value)
        variable = self.name(name, self.tvm.tirx.Var("", value.ty))
        self.tirx.Bind(value, var=variable)
        return variable

    def when(self, condition: Any) -> Any:
        return self.tirx.If(self.tvm.tirx.const(condition) if isinstance(condition, bool) else condition)

    def declare(self, name: str, parameters: dict[str, Any], result: Any) -> None:
        result = result and result().ty
        self.signatures[name] = (parameters, result)
        for parameter, value in parameters.items():
            self.name(parameter, value)
        function = self.tvm.tirx.PrimFunc(list(parameters.values()), None, ret_type=result)
        variable = self.declare_function(name, function)
        setattr(self.functions, name, lambda *given: self.tvm.ir.Call(variable, given, ret_ty=result))

    @contextmanager
    def function(self, name: str, **options: Any) -> Iterator[list[Any]]:
        parameters, result = self.signatures[name]
        with self.tirx.prim_func(**options):
            self.tirx.func_name(name)
            given = [self.tirx.arg(parameter, variable) for parameter, variable in parameters.items()]
            if result is not None:
                self.tirx.func_ret(result)
            yield given


def parse(text: str) -> Any:
    """The TVM module of a TVMScript text.

    text: one class of functions with an ``I.ir_module`` decorator, as ``lowering.module_text`` makes it.  Statements
    may be ``for``, ``if``, ``return``, stores, ``T.let`` bindings, buffers that get a name, and calls.  Raises what TVM
    raises for a kernel that is not valid.
    """
    import tvm
    from tvm.script.ir_builder import IRBuilder, tirx
    from tvm.script.ir_builder import ir as module_builder

    tree = ast.parse(text).body[0]
    assert isinstance(tree, ast.ClassDef)
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    program = ast.Module([*map(_signature, functions), *map(_definition, functions)], [])
    code = compile(ast.fix_missing_locations(program), "<kernels>", "exec")
    with IRBuilder() as builder:
        with module_builder.ir_module():
            helper = _Builder(tvm, tirx, IRBuilder, module_builder.decl_function)
            exec(code, {"T": tirx, "B": helper, tree.name: helper.functions})
        module = builder.get()
    tvm.s_tir.analysis.verify_well_formed(module)
    return module
