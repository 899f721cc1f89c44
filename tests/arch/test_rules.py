"""Each house rule catches what it forbids and lets the rest pass: tested on code that breaks it."""

import pytest

from tests.arch import rules
from tests.arch.rules import EVERYWHERE, LIBRARY, Rule
from tests.helpers.source import Source

DOC = '"""Holds a thing."""\n'
LAYER = 'class A:\n    """forward: nothing."""\n\n    def forward(self) -> None: ...\n'
LONG = "def f() -> None:\n" + "    x = 1\n" * 80

BREAKS: list[tuple[Rule, str, str]] = [
    (rules.imports_go_down, "pentode/nn/mlp.py", "from pentode.models.llama import build\n"),
    (rules.imports_go_down, "pentode/ops/rope.py", "from pentode.dist.mesh import Axis\n"),
    (rules.imports_go_down, "pentode/ops/rope.py", "from pentode import train\n"),
    (rules.imports_go_down, "pentode/log.py", "import pentode.device\n"),
    (rules.imports_go_down, "pentode/data/order.py", "def f() -> None:\n    from pentode.train import step\n"),
    (rules.imports_go_down, "pentode/data/order.py", "if TYPE_CHECKING:\n    from pentode.run.build import Run\n"),
    (rules.imports_go_down, "pentode/attic/box.py", ""),
    (rules.imports_go_down, "pentode/cli.py", "from pentode.attic import box\n"),
    (rules.imports_are_statements, "pentode/cli.py", "import importlib\nimportlib.import_module('pentode.nano')\n"),
    (rules.imports_are_statements, "pentode/nn/mlp.py", "from . import cache\n"),
    (rules.config_knows_no_torch, "pentode/config/check.py", "def f() -> None:\n    import torch\n"),
    (rules.package_files_are_empty, "pentode/nn/__init__.py", "from pentode.nn.mlp import MLP\n"),
    (rules.files_are_named_for_what_they_hold, "pentode/train/utils.py", ""),
    (rules.files_are_short, "pentode/nn/mlp.py", "x = 1\n" * 401),
    (rules.functions_are_short, "pentode/nn/mlp.py", LONG),
    (rules.only_device_says_cuda, "pentode/nn/mlp.py", "x = 'cuda:0'\n"),
    (rules.only_device_says_cuda, "pentode/nn/mlp.py", "import torch\ntorch.cuda.synchronize()\n"),
    (rules.only_device_says_cuda, "pentode/nn/mlp.py", "from torch.cuda import Stream\n"),
    (rules.only_device_says_cuda, "pentode/nn/mlp.py", "x.cuda()\n"),
    (
        rules.only_collectives_communicate,
        "pentode/optim/clip.py",
        "import torch.distributed as dist\ndist.all_reduce(x)\n",
    ),
    (rules.only_collectives_communicate, "pentode/dist/mesh.py", "import torch\ntorch.distributed.barrier()\n"),
    (rules.only_collectives_communicate, "pentode/run/build.py", "from torch.distributed import all_gather_object\n"),
    (
        rules.only_collectives_communicate,
        "pentode/run/build.py",
        "import torch\ntorch.ops._c10d_functional.all_reduce(x)\n",
    ),
    (rules.nothing_read_is_run, "pentode/data/order.py", "import pickle\n"),
    (rules.nothing_read_is_run, "pentode/data/order.py", "from joblib import load\n"),
    (rules.nothing_read_is_run, "pentode/data/order.py", "import torch as t\nt.load(path)\n"),
    (rules.nothing_read_is_run, "pentode/data/order.py", "from torch import load\nload(path)\n"),
    (rules.nothing_read_is_run, "pentode/data/order.py", "eval(text)\n"),
    (rules.nothing_read_is_run, "pentode/data/order.py", "np.load(path, allow_pickle=True)\n"),
    (rules.nothing_read_is_run, "pentode/data/order.py", "import yaml\nyaml.load(text, Loader=x)\n"),
    (rules.no_global_is_assigned, "pentode/log.py", "def f() -> None:\n    global x\n    x = 1\n"),
    (rules.comments_say_why, "pentode/log.py", "x = 1  # TODO: later\n"),
    (rules.comments_say_why, "pentode/log.py", "##########\n"),
    (rules.comments_say_why, "pentode/log.py", "# -------- helpers\n"),
    (rules.comments_say_why, "pentode/log.py", "# Copyright 2026\n"),
    (rules.code_is_ascii, "pentode/log.py", "x = '\u2192'\n"),
    (rules.public_things_are_described, "pentode/log.py", "x = 1\n"),
    (rules.public_things_are_described, "pentode/log.py", DOC + "def f() -> None:\n    pass\n"),
    (rules.public_things_are_described, "pentode/log.py", DOC + "class A:\n    pass\n"),
    (
        rules.public_things_are_described,
        "pentode/log.py",
        DOC + 'def read_rows(path: P) -> R:\n    """Read the rows of path."""\n',
    ),
    (rules.signatures_are_typed, "pentode/log.py", "def f(x) -> None:\n    pass\n"),
    (rules.signatures_are_typed, "pentode/log.py", "class A:\n    def f(self, *rest: int):\n        pass\n"),
    (rules.parallel_code_has_no_any, "pentode/dist/mesh.py", "from typing import Any\nx: Any = 1\n"),
    (rules.parallel_primitives_say_both_ways, "pentode/parallel/tensor.py", LAYER),
    (
        rules.parallel_primitives_say_both_ways,
        "pentode/dist/collectives.py",
        'def f(x: Tensor) -> Tensor:\n    """backward: nothing."""\n',
    ),
]

KEEPS: list[tuple[str, str]] = [
    ("pentode/train/step.py", "from pentode import device as devices\nfrom pentode.nn.mlp import MLP\n"),
    ("pentode/nn/mlp.py", "from pentode.nn.cache import Cache\n"),
    ("pentode/metrics/record.py", "cuda_memory_allocated = 1\nx = row['cuda_max_memory_reserved']\n"),
    (
        "pentode/dist/mesh.py",
        "import torch.distributed as dist\ndist.new_group([0])\ndist.get_rank()\nx: dist.ProcessGroup\n",
    ),
    (
        "pentode/dist/collectives.py",
        'import torch.distributed as dist\ndef sum_(x: Tensor) -> None:\n    """Add up."""\n',
    ),
    (
        "pentode/data/order.py",
        "import numpy as np\nimport yaml\nnp.load(p, allow_pickle=False)\nyaml.safe_load(t)\nm.eval()\n",
    ),
    ("pentode/data/order.py", "import re\nre.compile('x')\nblock.compile(fullgraph=True)\nself.load(x)\n"),
    ("pentode/data/order.py", "x = 1  # TODO(#12): faster\n"),
    (
        "pentode/data/order.py",
        "class _A:\n    @staticmethod\n    def f(x: int) -> None: ...\n    def g(self) -> None: ...\n",
    ),
    ("pentode/nn/__init__.py", ""),
]


@pytest.mark.parametrize(("rule", "path", "text"), BREAKS, ids=lambda value: getattr(value, "__name__", None))
def test_a_broken_rule_is_reported_with_its_place(rule: Rule, path: str, text: str) -> None:
    offences = list(rule(Source(path, text)))
    assert offences, f"{rule.__name__} lets this pass:\n{text}"
    assert all(line.startswith(path) for line in offences)


@pytest.mark.parametrize(("path", "text"), KEEPS)
def test_what_is_allowed_is_not_reported(path: str, text: str) -> None:
    text = DOC + text if text else text
    assert [line for rule in (*LIBRARY, *EVERYWHERE) for line in rule(Source(path, text))] == []


def test_every_rule_has_code_that_breaks_it() -> None:
    assert {rule for rule, _, _ in BREAKS} == {*LIBRARY, *EVERYWHERE}
