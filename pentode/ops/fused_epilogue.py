"""What quack-kernels is to do with a product's numbers, where it has no function for it. Imported where it is used."""

# pyright: reportMissingImports=false

from typing import Any

from quack.activation import dgate_fn_map
from quack.epilogue.frontend import gemm_epilogue, pack, unpack

gradients_of_swiglu = dgate_fn_map["swiglu"]


@gemm_epilogue(mode="packed_cd_b16x2")
def swiglu_gradient(acc: Any, c: Any) -> dict[str, Any]:
    """Of gate and up in turn, from the gradient of silu(gate) * up and from both."""
    gate, up = unpack(c)
    of_gate, of_up, _ = gradients_of_swiglu(gate, up, acc)
    return {"D": pack(of_gate, of_up)}
