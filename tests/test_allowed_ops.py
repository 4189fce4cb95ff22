import contextlib
import inspect
from itertools import chain
from pathlib import Path

import pytest
import torch
from torch import nn

from ghostify import GhostifyError
from ghostify.graph.allowed_ops import (
    CLASS_ATTRIBUTES,
    AllowedNames,
    allow_entries,
    check_method_name,
    is_mode_text,
    listed_names,
)
from ghostify.graph.ops import OPS
from ghostify.imports import import_name, import_object
from tests.command import run_code

CUSTOM = "tests.nets:Straight"


def installed(names):
    """The objects of that name; some are of other versions of the packages."""
    objects = {}
    for name in names:
        with contextlib.suppress(ImportError, AttributeError):
            objects[name] = import_object(name)
    assert len(objects) > 0.7 * len(names)
    return objects


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # of modules that the list names
def test_every_listed_name_is_what_its_section_says():
    listed = listed_names()
    assert all(issubclass(cls, nn.Module) for cls in installed(listed.modules).values())
    for name, function in installed(listed.functions).items():
        assert callable(function)
        assert not isinstance(function, type) or name.startswith("builtins:")
    assert all(isinstance(cls, type) for cls in installed(listed.objects).values())
    assert not listed.functions & listed.modules
    missing = [m for m in listed.methods if not any(hasattr(c, m) for c in (torch.Tensor, dict, list, torch.Size))]
    assert len(missing) < 0.1 * len(listed.methods)


def test_the_operator_table_is_in_the_list_by_construction():
    listed = listed_names()
    for op in OPS:
        assert {import_name(function) for function in op.functions} <= listed.functions
        assert {import_name(module) for module in op.modules} <= listed.modules
        assert set(op.methods) <= listed.methods


@pytest.mark.parametrize(
    "name",
    [
        "torch:load", "torch:save", "torch:from_file", "torch:compile", "torch.hub:load", "torch.serialization:load",
        "builtins:eval", "builtins:exec", "builtins:open", "builtins:type", "builtins:setattr", "builtins:map",
        "_operator:attrgetter", "_operator:methodcaller", "_operator:call", "functools:partial", "os:system",
        "timm.models._helpers:load_state_dict", "timm.models._factory:create_model", "torch.jit._script:ScriptModule",
        "torch.nn.parallel.data_parallel:DataParallel", "torch.fx.graph_module:GraphModule",
        "torch.nn.modules.conv:LazyConv2d", "torch._VF:from_file", "torch:_C._VariableFunctions.from_file",
    ],
)  # fmt: skip
def test_what_runs_code_reads_files_or_builds_classes_is_not_listed(name):
    assert not AllowedNames().is_allowed(name)


@pytest.mark.parametrize(
    "name", ["numpy", "data_ptr", "register_hook", "backward", "apply_", "set_", "format", "compile"]
)
def test_methods_that_leave_tensors_or_call_functions_are_not_listed(name):
    with pytest.raises(GhostifyError, match=f"method '{name}': is not allowed"):
        check_method_name(name)


def test_an_exact_entry_allows_one_name_and_a_module_what_it_defines():
    from tests import nets

    assert AllowedNames([CUSTOM]).module_class(CUSTOM) is nets.Straight
    assert AllowedNames(["tests.nets"]).module_class(CUSTOM) is nets.Straight
    assert AllowedNames(["tests.nets"]).function("tests.nets:settle") is nets.settle
    for allow, name, message in (
        ([CUSTOM], "tests.nets:Residual", r"tests\.nets:Residual: not in the list .*allow=\['tests\.nets:Residual'\]"),
        (["tests"], CUSTOM, "not in the list"),
        (["tests.nets"], "tests.nets:nn.Conv2d", "nn is not a class"),
        (["tests.nets"], "tests.nets:F.relu", "F is not a class"),
        (["ghostify.io.atomic"], "ghostify.io.atomic:os.replace", "os is not a class"),
        (["tests.command"], "tests.command:Path", "tests.command does not define it"),
        (["tests.nets"], "tests.nets:Missing", "is not installed"),
        (["no_such_package"], "no_such_package:Net", "is not installed .No module named"),
        ([], "torch.nn.modules.conv:Conv2d", "is not allowed here"),
    ):
        with pytest.raises(GhostifyError, match=message):
            AllowedNames(allow).function(name)


@pytest.mark.parametrize("entry", ["", "a b", "a:", ":b", "a:b:c", "a..b", 3, None, "a\nb"])
def test_an_entry_of_another_form_is_refused(entry):
    with pytest.raises(GhostifyError, match=r"is not a name\. Write package\.module:Name"):
        AllowedNames([entry])


def test_a_text_is_one_entry():
    assert AllowedNames(CUSTOM).is_custom(CUSTOM)


def test_a_refusal_names_what_would_allow_it():
    assert allow_entries(["a.b:C"]) == ("allow=['a.b:C']", "--allow a.b:C")
    assert allow_entries(["a.b:C", "a.b:D", "e:F"]) == ("allow=['a.b', 'e']", "--allow a.b --allow e")
    with pytest.raises(GhostifyError, match=r"a:B and 1 more names: not in the list .*--allow a --allow c\.$"):
        AllowedNames().check(["a:B", "torch:relu", "c:D"])
    with pytest.raises(GhostifyError, match="is not the name of a class or function"):
        AllowedNames().check(["a b:\nC"])


def test_what_is_not_listed_is_not_imported():
    script = (
        "import sys\nfrom ghostify.graph.allowed_ops import AllowedNames\nfrom ghostify import GhostifyError\n"
        "for name in ('this:s', 'ghostify.__main__:main', 'antigravity:x'):\n"
        "    try: AllowedNames().function(name)\n"
        "    except GhostifyError: pass\n"
        "assert not {'this', 'antigravity', 'ghostify.__main__'} & set(sys.modules)"
    )
    process = run_code(script, cwd=Path.cwd())
    assert (process.returncode, process.stdout, process.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("text", "is_mode"),
    [("bilinear", True), ("cuda:1", True), ("torch.FloatTensor", True), ("/etc/passwd", False), ("cuda:1/x", False)],
)
def test_texts_of_calls_are_modes_and_devices(text, is_mode):
    assert is_mode_text(text) is is_mode


def code_names(code):
    inner = [code_names(const) for const in code.co_consts if inspect.iscode(const)]
    return set(code.co_names).union(*inner)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_no_forward_reads_the_attributes_that_may_hold_a_class():
    # of all methods and functions that some forward may reach by their names
    called = {}
    listed = listed_names()
    for value in installed(listed.modules | listed.objects | listed.functions).values():
        members = [vars(cls).items() for cls in value.__mro__] if isinstance(value, type) else []
        for name, member in chain(*members, [(getattr(value, "__name__", ""), value)]):
            function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
            function = inspect.unwrap(function) if callable(function) else function
            if inspect.isfunction(function):
                called.setdefault(name, set()).update(code_names(function.__code__))
    reached = {"forward"} | {n for n in called if n.startswith("__")} - {"__init__", "__setstate__", "__repr__"}
    pending = list(reached)
    while pending:
        new = called.get(pending.pop(), set()) - reached
        reached |= new
        pending += new
    assert "forward_features" in reached
    assert not reached & CLASS_ATTRIBUTES
