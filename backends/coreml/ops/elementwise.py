"""Operations element by element, with numpy's broadcasting."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

NUMPY_DTYPES = {
    "bool": np.bool_,
    "fp16": np.float32,  # the interpreter rounds what is declared fp16
    "fp32": np.float32,
    "int8": np.int8,
    "int16": np.int16,
    "int32": np.int32,
    "uint8": np.uint8,
    "uint16": np.uint16,
}


def cast(x: np.ndarray, dtype: str) -> np.ndarray:
    """To bool, whatever is not 0; to integers, towards 0."""
    return x != 0 if dtype == "bool" else x.astype(NUMPY_DTYPES[dtype])


def clip(x: np.ndarray, alpha: np.ndarray, beta: np.ndarray) -> np.ndarray:
    """min(max(x, alpha), beta)."""
    return np.minimum(np.maximum(x, alpha), beta)


def erf(x: np.ndarray) -> np.ndarray:
    """The error function."""
    return torch.erf(torch.from_numpy(np.ascontiguousarray(x))).numpy().reshape(x.shape)


def gelu(x: np.ndarray, mode: str = "EXACT") -> np.ndarray:
    """x * Phi(x), or one of its two approximations."""
    if mode == "TANH_APPROXIMATION":
        return x * np.float32(0.5) * (1 + np.tanh(np.float32((2 / np.pi) ** 0.5) * (x + np.float32(0.044715) * x**3)))
    if mode == "SIGMOID_APPROXIMATION":
        return x * sigmoid(np.float32(1.702) * x)
    if mode != "EXACT":
        raise ValueError(f"no such mode of gelu: {mode}")
    return x * np.float32(0.5) * (1 + erf(x * np.float32(0.5**0.5)))


def inverse(x: np.ndarray, epsilon: float = 1e-4) -> np.ndarray:
    """1 / (x + epsilon)."""
    return 1 / (x + np.float32(epsilon))


def log(x: np.ndarray, epsilon: float = 1e-45) -> np.ndarray:
    """log(x + epsilon)."""
    return np.log(x + np.float32(epsilon))


def real_div(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """x / y of floats; MIL allows integers but does not say how their quotient is rounded."""
    if x.dtype.kind != "f":
        raise ValueError("the rounding of a quotient of integers is not defined; use floor_div")
    return x / y


def rsqrt(x: np.ndarray, epsilon: float = 1e-12) -> np.ndarray:
    """1 / sqrt(x + epsilon)."""
    return 1 / np.sqrt(x + np.float32(epsilon))


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)), without overflow."""
    return np.float32(0.5) * (1 + np.tanh(np.float32(0.5) * x))


def softplus(x: np.ndarray) -> np.ndarray:
    """log(1 + exp(x)), without overflow."""
    return np.logaddexp(x, np.float32(0))


OPERATIONS: dict[str, Callable[..., Any]] = {
    "abs": lambda x: np.abs(x),
    "add": lambda x, y: np.add(x, y),
    "cast": cast,
    "ceil": lambda x: np.ceil(x),
    "clip": clip,
    "cos": lambda x: np.cos(x),
    "equal": lambda x, y: np.equal(x, y),
    "erf": erf,
    "exp": lambda x: np.exp(x),
    "exp2": lambda x: np.exp2(x),
    "floor": lambda x: np.floor(x),
    "floor_div": lambda x, y: np.floor_divide(x, y),
    "gelu": gelu,
    "greater": lambda x, y: np.greater(x, y),
    "greater_equal": lambda x, y: np.greater_equal(x, y),
    "identity": lambda x: x,
    "inverse": inverse,
    "less": lambda x, y: np.less(x, y),
    "less_equal": lambda x, y: np.less_equal(x, y),
    "log": log,
    "logical_and": lambda x, y: np.logical_and(x, y),
    "logical_not": lambda x: np.logical_not(x),
    "logical_or": lambda x, y: np.logical_or(x, y),
    "logical_xor": lambda x, y: np.logical_xor(x, y),
    "maximum": lambda x, y: np.maximum(x, y),
    "minimum": lambda x, y: np.minimum(x, y),
    "mod": lambda x, y: np.mod(x, y),
    "mul": lambda x, y: np.multiply(x, y),
    "not_equal": lambda x, y: np.not_equal(x, y),
    "pow": lambda x, y: np.power(x, y),
    "real_div": real_div,
    "relu": lambda x: np.maximum(x, 0),
    "round": lambda x: np.round(x),
    "rsqrt": rsqrt,
    "select": lambda cond, a, b: np.where(cond, a, b),
    "sigmoid": sigmoid,
    "sign": lambda x: np.sign(x),
    "silu": lambda x: x * sigmoid(x),
    "sin": lambda x: np.sin(x),
    "softplus": softplus,
    "sqrt": lambda x: np.sqrt(x),
    "square": lambda x: np.square(x),
    "sub": lambda x, y: np.subtract(x, y),
    "tanh": lambda x: np.tanh(x),
}
