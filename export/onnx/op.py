"""`ai.lordba::SignAdapter`, version 1: the ONNX operator's schema, and its body in standard operators.

    y = base + s_out * (B (s_mid * (A (s_in * x))))        (LoRDBA, arXiv 2605.24058)

A model carries the body as a model-local function: a runtime that has no kernel for the node inlines it, one with ours
(backends/onnxruntime) calls the kernel.
"""

import onnx
from onnx import FunctionProto, defs
from onnx.shape_inference import InferenceContext

from lordba.onnx_adapter import PARAMETERS, RANGE_BYTES
from lordba.scales import ScaleCode

DOMAIN = "ai.lordba"
NAME = "SignAdapter"
VERSION = 1
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
        formal("signs", "tensor(uint8)", "[n], A [r, ceil(d_in/8)] and B [d_out, ceil(r/8)], lowest bit first, 1: -1"),
        formal("scales", "S", "[n], s_in, s_mid, s_out as stored; before codes the ranges, lo and hi of each in fp16"),
    ]
    schema = defs.OpSchema(
        NAME,
        DOMAIN,
        VERSION,
        doc="y = base + a low-rank adapter of packed signs applied to x; with an all-zero s_out, y = base.",
        inputs=inputs,
        outputs=[formal("y", "T", "[..., d_out]")],
        type_constraints=[
            ("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], "sums run in float"),
            ("S", ["tensor(float)", "tensor(float16)", "tensor(uint8)"], "the scale code's storage"),
        ],
        attributes=[defs.OpSchema.Attribute("scale_code", defs.OpSchema.AttrType.STRING, "fp32, fp16, int8 or log4")],
    )
    schema.set_type_and_shape_inference_function(_infer)
    defs.register_schema(schema)


def _infer(context: InferenceContext) -> None:
    """y is of base's type and shape."""
    base = context.get_input_type(1)
    if base is not None:
        context.set_output_type(0, base)


def function_body(code: ScaleCode) -> FunctionProto:
    """The operator in standard operators, for nodes with this scale code (a body cannot depend on an attribute)."""
    lines = [*_SIGN_TABLE, *_rank(code), *_SIGNS, *_LEVELS.get(code, [])]
    start = "scales_start"
    for index, (name, length) in enumerate((("s_in", "d_in"), ("s_mid", "r"), ("s_out", "d_out"))):
        lines += _scales(code, name, index, length, start)
        start = f"{name}_end"
    text = (
        f'<opset_import: ["" : {OPSET}], domain: "{DOMAIN}">\n'
        f"{NAME} <scale_code> (x, base, {', '.join(PARAMETERS)}) => (y)\n{{\n" + "\n".join(lines + _SUM) + "\n}"
    )
    return onnx.parser.parse_function(text)


# What depends on constants alone the runtime computes once, when it loads the model.
_SIGN_TABLE = """\
zero = Constant <value = int64[1] {0}> ()
last = Constant <value = int64[1] {-1}> ()
one = Constant <value = int64[1] {1}> ()
two = Constant <value = int64[1] {2}> ()
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
d_in = Shape <start = -1> (x)
d_out = Shape <start = -1> (base)""".splitlines()

_SIGNS = """\
d_in_up = Add (d_in, seven)
a_width = Div (d_in_up, eight)
a_end = Mul (r, a_width)
everything = Shape (signs)
a_shape = Concat <axis = 0> (last, a_width)
a_flat = Slice (signs, zero, a_end)
a_packed = Reshape (a_flat, a_shape)
a_index = Cast <to = 6> (a_packed)
a_bytes = Gather (signs_of_byte, a_index)
a_padded = Reshape (a_bytes, rows)
a = Slice (a_padded, zero, d_in, one)
b_shape = Concat <axis = 0> (d_out, last)
b_flat = Slice (signs, a_end, everything)
b_packed = Reshape (b_flat, b_shape)
b_index = Cast <to = 6> (b_packed)
b_bytes = Gather (signs_of_byte, b_index)
b_padded = Reshape (b_bytes, rows)
b = Slice (b_padded, zero, r, one)""".splitlines()

_SUM = """\
x_f = Cast <to = 1> (x)
x_scaled = Mul (x_f, s_in_f)
a_t = Transpose <perm = [1, 0]> (a)
h = MatMul (x_scaled, a_t)
h_scaled = Mul (h, s_mid_f)
b_t = Transpose <perm = [1, 0]> (b)
z = MatMul (h_scaled, b_t)
z_scaled = Mul (z, s_out_f)
term = CastLike (z_scaled, base)
y = Add (base, term)""".splitlines()

# The ranges, from the bits of fp16: (1024 + fraction) * 2^(exponent - 25), or fraction * 2^-24 where the exponent is 0.
# Then what the codes of each vector mean, [3, codes], in double and last in float, as lordba.scales.levels does it.
_RANGES = f"""\
range_end = Constant <value = int64[1] {{{RANGE_BYTES}}}> ()
range_bytes = Slice (scales, zero, range_end)
range_numbers = Cast <to = 7> (range_bytes)
pairs = Constant <value = int64[2] {{6, 2}}> ()
range_pairs = Reshape (range_numbers, pairs)
byte_places = Constant <value = int64[2] {{1, 256}}> ()
placed = Mul (range_pairs, byte_places)
half_bits = ReduceSum <keepdims = 0> (placed, one)
k1024 = Constant <value = int64 {{1024}}> ()
exponent = Div (half_bits, k1024)
fraction_bits = Mod (half_bits, k1024)
normal = Add (fraction_bits, k1024)
subnormal_row = Equal (exponent, first)
significand = Where (subnormal_row, fraction_bits, normal)
power_normal = Max (exponent, step)
k25 = Constant <value = int64 {{25}}> ()
power = Sub (power_normal, k25)
power_d = Cast <to = 11> (power)
two_d = Constant <value = double {{2}}> ()
size_d = Pow (two_d, power_d)
significand_d = Cast <to = 11> (significand)
ends = Mul (significand_d, size_d)
three_two = Constant <value = int64[2] {{3, 2}}> ()
ranges = Reshape (ends, three_two)
lo = Slice (ranges, zero, one, one)
hi = Slice (ranges, one, two, one)
code_steps = Range (first, steps, step)
code_steps_d = Cast <to = 11> (code_steps)
fraction = Div (code_steps_d, last_step)""".splitlines()
_WITH_ZERO = """\
positive_f = Cast <to = 1> (positive)
front = Constant <value = int64[4] {0, 1, 0, 0}> ()
levels = Pad (positive_f, front)""".splitlines()
_LEVELS = {
    ScaleCode.LOG4: [
        "steps = Constant <value = int64 {15}> ()",
        "last_step = Constant <value = double {14}> ()",
        *_RANGES,
        "ratio = Div (hi, lo)",
        "growth = Pow (ratio, fraction)",
        "positive = Mul (lo, growth)",
        *_WITH_ZERO,
        "four = Constant <value = uint8 {4}> ()",
        'high = BitShift <direction = "RIGHT"> (byte_column, four)',
        "fifteen = Constant <value = uint8 {15}> ()",
        "low = BitwiseAnd (byte_column, fifteen)",
        "halves = Concat <axis = 1> (low, high)",
        "codes_of_byte = Cast <to = 6> (halves)",
    ],
    ScaleCode.INT8: [
        "steps = Constant <value = int64 {255}> ()",
        "last_step = Constant <value = double {254}> ()",
        *_RANGES,
        "width = Sub (hi, lo)",
        "distance = Mul (width, fraction)",
        "positive = Add (lo, distance)",
        *_WITH_ZERO,
    ],
}


def _stored(code: ScaleCode, name: str, length: str) -> list[str]:
    """`name`_stored, the elements that hold the vector `name` of that length."""
    if code is not ScaleCode.LOG4:
        return [f"{name}_stored = Identity ({length})"]
    return [f"{name}_even = Add ({length}, one)", f"{name}_stored = Div ({name}_even, two)"]


def _rank(code: ScaleCode) -> list[str]:
    """r, from the length of the scales; and where they start."""
    start = RANGE_BYTES if code.is_coded else 0
    lines = [
        f"scales_start = Constant <value = int64[1] {{{start}}}> ()",
        *_stored(code, "s_in", "d_in"),
        *_stored(code, "s_out", "d_out"),
        "length = Shape (scales)",
        "others = Add (s_in_stored, s_out_stored)",
        "others_and_start = Add (others, scales_start)",
        "s_mid_stored = Sub (length, others_and_start)",
    ]
    return [*lines, "r = Mul (s_mid_stored, two)" if code is ScaleCode.LOG4 else "r = Identity (s_mid_stored)"]


def _scales(code: ScaleCode, name: str, index: int, length: str, start: str) -> list[str]:
    """The vector `name` as floats of that length; it begins at `start` of `scales` and ends at `name`_end."""
    lines = [f"{name}_end = Add ({start}, {name}_stored)", f"{name} = Slice (scales, {start}, {name}_end)"]
    if not code.is_coded:
        return [*lines, f"{name}_f = Cast <to = 1> ({name})"]
    lines += [
        f"{name}_row = Constant <value = int64 {{{index}}}> ()",
        f"{name}_levels = Gather (levels, {name}_row)",
        f"{name}_index = Cast <to = 6> ({name})",
    ]
    if code is ScaleCode.INT8:
        return [*lines, f"{name}_f = Gather ({name}_levels, {name}_index)"]
    return [
        *lines,
        f"{name}_halves = Gather (codes_of_byte, {name}_index)",
        f"{name}_padded = Reshape ({name}_halves, last)",
        f"{name}_codes = Slice ({name}_padded, zero, {length})",
        f"{name}_f = Gather ({name}_levels, {name}_codes)",
    ]
