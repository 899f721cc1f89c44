"""A run begins without torch's compiler, whose import alone takes seconds, where nothing is to be compiled."""

import subprocess
import sys
from pathlib import Path

from tests.helpers.tiny import tiny_yaml

LLAMA = {
    "type": "llama",
    "vocab_size": -1,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 16,
}
PROGRAM = """
import sys
from pathlib import Path
from pentode.config.load import load_config
from pentode.train.start import start
start(load_config(Path(sys.argv[1])))
print(sorted({"sympy", "torch._dynamo", "torch._inductor"} & set(sys.modules)))
"""


def test_a_llama_trains_without_the_compiler(tmp_path: Path) -> None:
    """On a CPU; and where there is a GPU, on that."""
    file = tiny_yaml(tmp_path, general__device="auto", model__model_config=LLAMA)
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(file)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
