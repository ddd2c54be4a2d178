"""Processor: what the fast and exact 8-bit kernels of a machine want. It runs none of them."""

from serve.machine import Machine

# Instructions that add four 8-bit products to 32 bits without saturating in between.
_DOT_PRODUCT_FLAGS = frozenset({"avx512_vnni", "avx_vnni", "amx_int8"})


def kernel_layout(machine: Machine) -> tuple[str, bool]:
    """(type of activations, whether pairs of products saturate) for the fast and exact kernels.

    x86 multiplies unsigned by signed bytes; before VNNI the sum of two products saturates at 16
    bits (vpmaddubsw), for which weights are kept small. ARM multiplies signed by signed.
    """
    if "x86_64" not in machine.system and "AMD64" not in machine.system:
        return "int8", False
    return "uint8", not _DOT_PRODUCT_FLAGS & set(machine.flags)
