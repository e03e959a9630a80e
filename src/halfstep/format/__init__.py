"""What a number is: formats as frozen data, and the exact scalar codec."""

from halfstep.format.accumulator import Accumulator, Order, Products
from halfstep.format.blocks import BlockFormat, ScaleRule, block_formats
from halfstep.format.catalogue import formats
from halfstep.format.choices import Kind, Overflow, Rounding, Specials, Subnormals
from halfstep.format.codec import Value, decode, encode, overflow, round_number
from halfstep.format.number import Format
from halfstep.format.units import Datapath, Unit, units

__all__ = [
    "Accumulator",
    "BlockFormat",
    "Datapath",
    "Format",
    "Kind",
    "Order",
    "Overflow",
    "Products",
    "Rounding",
    "ScaleRule",
    "Specials",
    "Subnormals",
    "Unit",
    "Value",
    "block_formats",
    "decode",
    "encode",
    "formats",
    "overflow",
    "round_number",
    "units",
]
