"""Writes `ghostify/graph/allowed_names.txt`, the names that a saved model may use: `python docs/list_allowed_names.py`.

The list has the functions, methods and module classes of PyTorch that compute on tensors, and those that models of timm
and torchvision use: their module classes, and what the graphs of one to three models of each family call. Names that an
earlier run listed stay, for other versions of the packages, unless they are refused here. Review the change before you
commit it: what is in the list runs without the user's permission. Takes some minutes and fetches nothing.
"""

# ruff: noqa: SIM905

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import logging
import pkgutil
import re
import textwrap
import types
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from timm.layers import get_notrace_functions
from torch import nn
from torch.overrides import get_overridable_functions

from ghostify import GhostifyError, trace
from ghostify.graph.allowed_ops import NAMES_FILE, names_in_file, names_in_table
from ghostify.graph.serialization import serialize_module
from ghostify.imports import import_name, is_importable

FILE = Path(__file__).parents[1] / "ghostify/graph" / NAMES_FILE
MODELS_PER_FAMILY = 3
MODULE_PACKAGES = ("torch.nn.modules", "timm.layers", "timm.models", "torchvision.models", "torchvision.ops")
CREATION = (
    "arange", "as_tensor", "empty", "eye", "full", "linspace", "logspace", "ones", "rand", "randint", "randn",
    "randperm", "scalar_tensor", "tensor", "tril_indices", "triu_indices", "zeros", "_assert",
)  # fmt: skip
OPERATORS = (
    "abs add and_ concat contains eq floordiv ge getitem gt iadd iand ifloordiv imul invert ior ipow isub itruediv le "
    "lshift lt matmul mod mul ne neg not_ or_ pos pow rshift sub truediv truth xor is_ is_not"
).split()
MATH = "ceil cos exp floor fmod gcd isqrt log log2 pow prod sin sqrt tanh trunc".split()
BUILTINS = "abs bool float int len list max min round slice sum tuple".split()
CONTAINER_METHODS = "append count extend get index items keys numel values".split()
OWN_FUNCTIONS = (
    "ghostify.modules.ghost:concat_channels", "ghostify.graph.symbolic_tracer:check_default_argument",
    "ghostify.graph.symbolic_tracer:check_no_extra_arguments", "ghostify.graph.symbolic_tracer:check_training_mode",
)  # fmt: skip
OWN_MODULES = (
    "ghostify.modules.ghost:GhostModule", "ghostify.modules.ghost:CheapOperation",
    "ghostify.graph.symbolic_tracer:TrainingFlag",
)  # fmt: skip
OBJECTS = (
    "timm.models._features:FeatureInfo", "timm.models._pretrained:PretrainedCfg",
    "torchvision.models.detection.image_list:ImageList", "torchvision.ops.poolers:LevelMapper",
    "torchvision.transforms.functional:InterpolationMode",
)  # fmt: skip
QUANTIZATION = (
    "torch.ao.quantization.stubs:QuantStub", "torch.ao.quantization.stubs:DeQuantStub",
    "torch.ao.nn.quantized.modules.functional_modules:FloatFunctional",
)  # fmt: skip
PREPROCESSING = "CenterCrop ConvertImageDtype Grayscale Normalize Pad Resize".split()
REFUSED_MODULES = re.compile(r"Lazy|_Lazy|FeatureHookNet|FeatureGraphNet|DualGraph|LeafModule")
REFUSED_FUNCTIONS = re.compile(
    r".*:(fbgemm_|miopen_|choose_qparams|batch_norm_|native_|quantized_|unsafe_|fused_|autocast|lobpcg|hash_tensor|"
    r"norm_except_dim|(?!index_).*_copy$|is_distributed|sym_sum|slice_inverse|get_device)"
)
REFUSED_METHODS = frozenset(
    "apply_ backward const_data_ptr data_ptr is_distributed is_pinned is_set_to is_shared map2_ map_ module_load numpy "
    "pin_memory record_stream register_hook register_post_accumulate_grad_hook resize resize_ resize_as resize_as_ "
    "resize_as_sparse_ retain_grad set_ share_memory_ slice_inverse sparse_resize_ sparse_resize_and_clear_ storage "
    "storage_type untyped_storage unsafe_chunk unsafe_split unsafe_split_with_sizes hash_tensor".split()
)

Names = dict[str, set[str]]


def module_classes() -> Iterator[str]:
    """The module classes that the packages define."""
    for root in MODULE_PACKAGES:
        package = importlib.import_module(root)
        for info in pkgutil.walk_packages(package.__path__, f"{root}."):
            with contextlib.suppress(ImportError):
                module = importlib.import_module(info.name)
                for value in vars(module).values():
                    if inspect.isclass(value) and issubclass(value, nn.Module) and value.__module__ == info.name:
                        yield import_name(value)


def tensor_functions() -> Iterator[str]:
    """The functions of PyTorch, Python and timm's helpers that compute on tensors, numbers and sequences."""
    for owner, functions in get_overridable_functions().items():
        if isinstance(owner, types.ModuleType):
            yield from (import_name(function) for function in functions if is_importable(function))
    yield from (f"torch:{name}" for name in CREATION)
    yield from (f"_operator:{name}" for name in OPERATORS)
    yield from (f"math:{name}" for name in MATH)
    yield from (f"builtins:{name}" for name in BUILTINS)
    yield from (import_name(function) for function in get_notrace_functions() if callable(function))


def tensor_methods() -> Iterator[str]:
    """Names of the public methods of tensors and of their containers."""
    for function in get_overridable_functions()[torch.Tensor]:
        yield function.__name__
    yield from CONTAINER_METHODS
    yield from ("new_empty", "new_full", "new_ones", "new_tensor", "new_zeros")


def sample_of_models() -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    """The architectures of torchvision and some of each family of timm, by title."""
    for name in torchvision.models.list_models():
        parameters = inspect.signature(torchvision.models.get_model_builder(name)).parameters
        none = {key: None for key in ("weights", "weights_backbone") if key in parameters}
        yield f"torchvision:{name}", lambda name=name, none=none: torchvision.models.get_model(name, **none)
    for family in timm.list_modules():
        names = timm.list_models(module=family)
        for name in names[:: max(1, len(names) // MODELS_PER_FAMILY)]:
            yield f"timm:{name}", lambda name=name: timm.create_model(name)


def description_of(make: Callable[[], nn.Module]) -> dict[str, Any]:
    """The description of a traced model; its weights take memory only where it does not trace without them."""
    unchecked_trace = inspect.unwrap(trace)  # which takes weights on the meta device
    for device in ("meta", "cpu"):
        with contextlib.suppress(NotImplementedError):
            with torch.device(device):
                model = make().eval()
            return serialize_module(unchecked_trace(model).module)[0]
    raise AssertionError(make)


def names_of_models() -> Names:
    """The names that saved models of the sample have."""
    names: Names = defaultdict(set)
    for title, make in sample_of_models():
        try:
            data = description_of(make)
        except GhostifyError as error:
            print(f"{title}: {error}")
            continue
        for item in data["modules"].values():
            if "class" in item:
                names["modules"].add(item["class"])
            _add_values(item.get("attributes", {}), names)
            for node in item.get("nodes", ()):
                if node["op"] == "call_function":
                    names["functions"].add(node["target"])
                elif node["op"] == "call_method":
                    names["methods"].add(node["target"])
                _add_values([node["args"], node["kwargs"]], names)
    return names


def _add_values(value: Any, names: Names) -> None:
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _add_values(inner, names)
    if isinstance(value, dict):
        for kind, section in (("object", "objects"), ("enum", "objects"), ("partial", "functions")):
            if kind in value:
                names[section].add(value[kind][0])
        if "function" in value:
            names["functions"].add(value["function"])


def collect() -> Names:
    """All names by section, less those that are refused and those of the operator table."""
    names = names_of_models()
    names["modules"] |= {*module_classes(), *OWN_MODULES, *QUANTIZATION}
    names["objects"] |= set(OBJECTS)
    names["modules"] |= {f"torchvision.transforms.transforms:{name}" for name in PREPROCESSING}
    names["functions"] |= {*tensor_functions(), *OWN_FUNCTIONS}
    names["methods"] |= set(tensor_methods())
    if FILE.exists():
        for section, listed in vars(names_in_file()).items():
            names[section] |= listed
    names["functions"] -= names["modules"]
    refused = {
        "modules": lambda name: REFUSED_MODULES.search(name),
        "functions": lambda name: REFUSED_FUNCTIONS.match(name),
        "objects": lambda _: False,
        "methods": lambda name: name in REFUSED_METHODS or name.startswith("_"),
    }
    table = vars(names_in_table())
    return {
        section: {name for name in names[section] - table[section] if not is_refused(name)}
        for section, is_refused in refused.items()
    }


def text_of(names: Names) -> str:
    """The file's text."""
    lines = [
        "# The functions, methods and classes that a saved model may name, each by its full name, beside those of the",
        "# operator table in ops.py. Written by `python docs/list_allowed_names.py`; see docs/security.md.",
    ]
    for section, listed in names.items():
        lines += ["", f"[{section}]"]
        by_module: dict[str, list[str]] = defaultdict(list)
        for name in sorted(listed):
            module, _, qualified = name.rpartition(":")
            by_module[module].append(qualified)
        for module, qualified_names in by_module.items():
            prefix = f"{module}: " if module else ""
            width = max(118 - len(prefix), 40)
            lines += [prefix + line for line in textwrap.wrap(" ".join(qualified_names), width, break_on_hyphens=False)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    FILE.write_text(text_of(collect()))
    print(json.dumps({section: len(names) for section, names in vars(names_in_file()).items()}))
