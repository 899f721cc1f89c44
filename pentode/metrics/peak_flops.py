"""The peak speed of known accelerators, which MFU is a fraction of."""

import re

# Dense bfloat16 FLOP/s with float32 accumulation, from the vendors' data sheets (no 2:4 sparsity); first match wins.
PEAKS = (
    (r"GB200", 2500e12),
    (r"B200", 2250e12),
    (r"H[12]00 NVL", 835e12),
    (r"H[18]00 PCIe", 756e12),
    (r"H100|H200|GH200|H800", 989e12),
    (r"H20", 148e12),
    (r"A100|A800", 312e12),
    (r"A40", 149.7e12),
    (r"A30", 165e12),
    (r"A10", 125e12),
    (r"A10G", 70e12),
    (r"RTX A6000", 154.8e12),
    (r"L40S", 362e12),
    (r"L40", 181e12),
    (r"L4", 121e12),
    (r"RTX 3090", 71e12),
    (r"RTX 4090", 165.2e12),
    (r"RTX 5090", 209.5e12),
    (r"MI210|MI250", 181e12),  # MI250: one of its two dies, which is what torch calls a device
    (r"MI250X", 191.5e12),
    (r"MI300X|MI325X", 1307e12),
    (r"MI355X", 2500e12),
)
LESSER = re.compile(r"\bMIG\b|\bLaptop\b|\b4090 D\b|\b5090 D\b")  # a slice of a card, or a slower one of the same name


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of the device that torch calls `device_name`; None if unknown, and then there is no MFU."""
    if LESSER.search(device_name):
        return None
    return next((peak for pattern, peak in PEAKS if re.search(rf"\b(?:{pattern})\b", device_name)), None)
