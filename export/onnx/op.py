"""`ai.lordba::SignAdapter`, version 2: the ONNX operator's schema, and its body in standard operators.

    y = base + s_out * (B (s_mid * (A (s_in * x))))        (LoRDBA, arXiv 2605.24058)

`adapter` is one adapter blob (docs/format.md) for all nodes, of which a node reads the module that its attribute names:
ONNX Runtime takes its time for every tensor that a run overrides. A model carries the body as a model-local function: a
runtime that has no kernel for the node inlines it, one with ours (backends/onnxruntime) calls the kernel.
"""

import onnx
from onnx import FunctionProto, defs
from onnx.shape_inference import InferenceContext

from lordba.blob import HEADER, RECORD
from lordba.scales import ScaleCode

DOMAIN = "ai.lordba"
NAME = "SignAdapter"
VERSION = 2
OPSET = 18
"""The standard operators' version of exported models: the first with BitwiseAnd, and old runtimes know it."""
IR_VERSION = 9
"""What ONNX Runtime 1.17 reads."""


def register_schema() -> None:
    """Make the operator known to onnx's checker and shape inference in this process."""
    if defs.has(NAME, domain=DOMAIN):
        return
    formal = defs.OpSchema.FormalParameter
    inputs = [
        formal("x", "T", "[..., d_in]"),
        formal("base", "T", "[..., d_out], what the adapter is added to"),
        formal("adapter", "tensor(uint8)", "[n], an adapter blob: header, a record per module, signs and scales"),
    ]
    schema = defs.OpSchema(
        NAME,
        DOMAIN,
        VERSION,
        doc="y = base + a low-rank adapter of packed signs applied to x; with an all-zero s_out, y = base.",
        inputs=inputs,
        outputs=[formal("y", "T", "[..., d_out]")],
        type_constraints=[("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], "sums run in float")],
        attributes=[defs.OpSchema.Attribute("module", defs.OpSchema.AttrType.INT, "which record of the adapter")],
    )
    schema.set_type_and_shape_inference_function(_infer)
    defs.register_schema(schema)


def _infer(context: InferenceContext) -> None:
    """y is of base's type and shape."""
    base = context.get_input_type(1)
    if base is not None:
        context.set_output_type(0, base)


def function_body(code: ScaleCode) -> FunctionProto:
    """The operator in standard operators, for adapters with this scale code and a rank of 1 or more in every module."""
    lines = [*_SIGN_TABLE, *_RECORD, *_SIGNS]
    for name, length in (("s_in", "d_in"), ("s_mid", "r"), ("s_out", "d_out")):
        lines += _scales(code, name, length)
    text = (
        f'<opset_import: ["" : {OPSET}], domain: "{DOMAIN}">\n'
        f"{NAME} <module> (x, base, adapter) => (y)\n{{\n" + "\n".join(lines + _SUM) + "\n}"
    )
    return onnx.parser.parse_function(text)


# What depends on constants alone the runtime computes once, when it loads the model.
_SIGN_TABLE = """\
zero = Constant <value = int64[1] {0}> ()
last = Constant <value = int64[1] {-1}> ()
one = Constant <value = int64[1] {1}> ()
seven = Constant <value = int64[1] {7}> ()
eight = Constant <value = int64[1] {8}> ()
rows = Constant <value = int64[2] {0, -1}> ()
first = Constant <value = int64 {0}> ()
count = Constant <value = int64 {256}> ()
step = Constant <value = int64 {1}> ()
numbers = Range (first, count, step)
bytes = Cast <to = 2> (numbers)
byte_column = Unsqueeze (bytes, one)
places = Constant <value = uint8[8] {0, 1, 2, 3, 4, 5, 6, 7}> ()
shifted = BitShift <direction = "RIGHT"> (byte_column, places)
low_bit = Constant <value = uint8 {1}> ()
bits = BitwiseAnd (shifted, low_bit)
bit_values = Cast <to = 1> (bits)
two_f = Constant <value = float {2}> ()
one_f = Constant <value = float {1}> ()
doubled = Mul (bit_values, two_f)
signs_of_byte = Sub (one_f, doubled)
four = Constant <value = uint8 {4}> ()
high = BitShift <direction = "RIGHT"> (byte_column, four)
fifteen = Constant <value = uint8 {15}> ()
low = BitwiseAnd (byte_column, fifteen)
halves = Concat <axis = 1> (low, high)
codes_of_byte = Cast <to = 6> (halves)
zero_f = Constant <value = float {0}> ()
two_d = Constant <value = double {2}> ()
d_in = Shape <start = -1> (x)
d_out = Shape <start = -1> (base)""".splitlines()

_WORD_BYTES = 4
# The record's numbers of 32 bits; of those of 64 bits the lower halves, for a tensor's bytes are fewer than 2^32.
_FIELDS = {"r": 0, "a_start": 4, "b_start": 6, "s_in_start": 8, "s_mid_start": 10, "s_out_start": 12}


def _constant(name: str, value: int) -> str:
    return f"{name} = Constant <value = int64[1] {{{value}}}> ()"


def _integers(name: str, start: str, end: str, width: int) -> list[str]:
    """`name`, each `width` bytes of the adapter from `start` to `end` as a little-endian integer, int64 [n]."""
    weights = ", ".join(str(256**i) for i in range(width))
    return [
        f"{name}_bytes = Slice (adapter, {start}, {end})",
        f"{name}_numbers = Cast <to = 7> ({name}_bytes)",
        f"{name}_shape = Constant <value = int64[2] {{-1, {width}}}> ()",
        f"{name}_rows = Reshape ({name}_numbers, {name}_shape)",
        f"{name}_weights = Constant <value = int64[{width}] {{{weights}}}> ()",
        f"{name}_placed = Mul ({name}_rows, {name}_weights)",
        f"{name} = ReduceSum <keepdims = 0> ({name}_placed, one)",
    ]


def _floats(name: str, start: str, end: str, width: int) -> list[str]:
    """`name`, the non-negative floats of `width` bytes between these places, float [n], every one exactly.

    With f bits of fraction (2^f + fraction) 2^(exponent - bias - f), or fraction 2^(1 - bias - f) for the exponent 0.
    """
    fraction_bits, bias = {4: (23, 127), 2: (10, 15)}[width]
    return [
        *_integers(f"{name}_word", start, end, width),
        _constant(f"{name}_hidden", 2**fraction_bits),
        f"{name}_exponent = Div ({name}_word, {name}_hidden)",
        f"{name}_fraction = Mod ({name}_word, {name}_hidden)",
        f"{name}_normal = Add ({name}_fraction, {name}_hidden)",
        f"{name}_is_subnormal = Equal ({name}_exponent, zero)",
        f"{name}_significand = Where ({name}_is_subnormal, {name}_fraction, {name}_normal)",
        f"{name}_raised = Max ({name}_exponent, one)",
        _constant(f"{name}_bias", bias + fraction_bits),
        f"{name}_power = Sub ({name}_raised, {name}_bias)",
        f"{name}_power_d = Cast <to = 11> ({name}_power)",
        f"{name}_size = Pow (two_d, {name}_power_d)",
        f"{name}_significand_d = Cast <to = 11> ({name}_significand)",
        f"{name}_d = Mul ({name}_significand_d, {name}_size)",
        f"{name} = Cast <to = 1> ({name}_d)",
    ]


_RECORD = [
    "index = Constant <value_int: int = @module> ()",
    _constant("record_size", RECORD.size),
    _constant("header_size", HEADER.size),
    "record_place = Mul (index, record_size)",
    "record_start = Add (record_place, header_size)",
    "record_end = Add (record_start, record_size)",
    *_integers("record", "record_start", "record_end", _WORD_BYTES),
    *(_constant(f"{name}_at", place) for name, place in _FIELDS.items()),
    *(f"{name} = Gather (record, {name}_at)" for name in _FIELDS),
]

_SIGNS = """\
d_in_up = Add (d_in, seven)
a_width = Div (d_in_up, eight)
a_count = Mul (r, a_width)
a_end = Add (a_start, a_count)
a_shape = Concat <axis = 0> (last, a_width)
a_flat = Slice (adapter, a_start, a_end)
a_packed = Reshape (a_flat, a_shape)
a_index = Cast <to = 6> (a_packed)
a_bytes = Gather (signs_of_byte, a_index)
a_padded = Reshape (a_bytes, rows)
a = Slice (a_padded, zero, d_in, one)
r_up = Add (r, seven)
b_width = Div (r_up, eight)
b_count = Mul (d_out, b_width)
b_end = Add (b_start, b_count)
b_shape = Concat <axis = 0> (d_out, last)
b_flat = Slice (adapter, b_start, b_end)
b_packed = Reshape (b_flat, b_shape)
b_index = Cast <to = 6> (b_packed)
b_bytes = Gather (signs_of_byte, b_index)
b_padded = Reshape (b_bytes, rows)
b = Slice (b_padded, zero, r, one)""".splitlines()

_SUM = """\
x_f = Cast <to = 1> (x)
x_scaled = Mul (x_f, s_in)
a_t = Transpose <perm = [1, 0]> (a)
h = MatMul (x_scaled, a_t)
h_scaled = Mul (h, s_mid)
b_t = Transpose <perm = [1, 0]> (b)
z = MatMul (h_scaled, b_t)
z_scaled = Mul (z, s_out)
term = CastLike (z_scaled, base)
y = Add (base, term)""".splitlines()


def _scales(code: ScaleCode, name: str, length: str) -> list[str]:
    """The vector `name` as floats of that length; it begins at `name`_start."""
    if not code.is_coded:
        width = 4 if code is ScaleCode.FP32 else 2
        return [
            _constant(f"{name}_width", width),
            f"{name}_count = Mul ({length}, {name}_width)",
            f"{name}_end = Add ({name}_start, {name}_count)",
            *_floats(name, f"{name}_start", f"{name}_end", width),
        ]
    meaning = 16 if code is ScaleCode.LOG4 else 2
    lines = [
        _constant(f"{name}_meaning_bytes", 4 * meaning),
        f"{name}_codes_start = Add ({name}_start, {name}_meaning_bytes)",
        *_floats(f"{name}_meaning", f"{name}_start", f"{name}_codes_start", 4),
    ]
    if code is ScaleCode.LOG4:
        return [
            *lines,
            _constant(f"{name}_two", 2),
            f"{name}_even = Add ({length}, one)",
            f"{name}_count = Div ({name}_even, {name}_two)",
            f"{name}_end = Add ({name}_codes_start, {name}_count)",
            f"{name}_stored = Slice (adapter, {name}_codes_start, {name}_end)",
            f"{name}_index = Cast <to = 6> ({name}_stored)",
            f"{name}_pairs = Gather (codes_of_byte, {name}_index)",
            f"{name}_padded = Reshape ({name}_pairs, last)",
            f"{name}_codes = Slice ({name}_padded, zero, {length})",
            f"{name} = Gather ({name}_meaning, {name}_codes)",
        ]
    return [
        *lines,
        f"{name}_end = Add ({name}_codes_start, {length})",
        f"{name}_codes = Slice (adapter, {name}_codes_start, {name}_end)",
        f"{name}_codes_f = Cast <to = 1> ({name}_codes)",
        f"{name}_lo = Gather ({name}_meaning, zero)",
        f"{name}_step = Gather ({name}_meaning, one)",
        f"{name}_steps = Sub ({name}_codes_f, one_f)",
        f"{name}_distance = Mul ({name}_step, {name}_steps)",
        f"{name}_value = Add ({name}_lo, {name}_distance)",
        f"{name}_is_zero = Less ({name}_codes_f, one_f)",
        f"{name} = Where ({name}_is_zero, zero_f, {name}_value)",
    ]
