"""What each MIL operation computes, as numpy functions that take MIL's parameters by name.

Values of fp16 and fp32 are float32 arrays here: an operation computes in float32, and the interpreter rounds what is
declared fp16, once per operation. Integers and booleans keep their dtypes. A mistake in the arguments is a ValueError.
"""

from collections.abc import Callable
from typing import Any

from lordba.backends.coreml.ops import elementwise, indexing, linear, reduction, shape

OPERATIONS: dict[str, Callable[..., Any]] = {
    **elementwise.OPERATIONS,
    **indexing.OPERATIONS,
    **linear.OPERATIONS,
    **reduction.OPERATIONS,
    **shape.OPERATIONS,
}
"""By MIL's name; the result is an array, or a tuple of them where the operation has several outputs."""
