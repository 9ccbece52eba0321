"""The operations of the interpreter that move elements, in programs that coremltools wrote, against PyTorch."""

# ruff: noqa: E731 (a table of short functions reads best)

import numpy as np
import pytest
import torch
from mil_programs import Cases, mb, on_macos, save_functions, tensor
from test_coreml_interpreter_ops import CASES as OTHERS
from test_coreml_interpreter_ops import integers, normal, positive
from torch import Tensor
from torch.nn import functional as F

from lordba.backends.coreml.interpreter import Package, load
from lordba.backends.coreml.ops import OPERATIONS
from lordba.errors import LordbaError

CASES = Cases()
case = CASES.add


def shapes() -> None:
    case("reshape.1", lambda x: mb.reshape(x=x, shape=[4, -1]), lambda x: x.reshape(4, -1), normal(2, 3, 4))
    case("reshape.0", lambda x: mb.reshape(x=x, shape=[0, -1, 2]), lambda x: x.reshape(2, 6, 2), normal(2, 3, 4))
    case("transpose.1", lambda x: mb.transpose(x=x, perm=[-1, 0, 1]), lambda x: x.permute(2, 0, 1), normal(2, 3, 4))
    case("expand_dims.1", lambda x: mb.expand_dims(x=x, axes=[-1, 1]), lambda x: x[:, None, :, None], normal(2, 3))
    case("squeeze.1", lambda x: mb.squeeze(x=x, axes=[0, -1]), lambda x: x[0, :, :, 0], normal(1, 3, 1, 1))
    case("squeeze.all", lambda x: mb.squeeze(x=x), torch.squeeze, normal(1, 3, 1, 2))
    joined = lambda x, y: mb.concat(values=[x, y], axis=-2)
    case("concat.1", joined, lambda x, y: torch.cat([x, y], -2), normal(2, 3, 4), normal(2, 1, 4))
    turns = lambda x, y: mb.concat(values=[x, y], axis=1, interleave=True)
    case("concat.turns", turns, lambda x, y: torch.stack([x, y], 2).flatten(1, 2), normal(2, 3, 4), normal(2, 3, 4))
    one = lambda x: mb.concat(values=[x], axis=0)
    case("concat.one", one, lambda x: x, normal(2, 3))
    stacked = lambda x, y: mb.stack(values=[x, y], axis=-1)
    case("stack.1", stacked, lambda x, y: torch.stack([x, y], -1), normal(2, 3), normal(2, 3))
    case("split.equal", lambda x: mb.split(x=x, num_splits=3, axis=1), lambda x: x.chunk(3, 1), normal(2, 6))
    sizes = lambda x: mb.split(x=x, split_sizes=[1, 3, 2], axis=-1)
    case("split.sizes", sizes, lambda x: x.split([1, 3, 2], -1), normal(2, 6))
    case("tile.1", lambda x: mb.tile(x=x, reps=[2, 1, 3]), lambda x: x.repeat(2, 1, 3), normal(2, 3, 2))
    case("reverse.1", lambda x: mb.reverse(x=x, axes=[0, -1]), lambda x: x.flip(0, 2), normal(2, 3, 4))
    case("shape.1", lambda x: mb.shape(x=x), lambda x: torch.tensor(x.shape), normal(2, 5, 3))
    case("pad.constant", lambda x: mb.pad(x=x, pad=[1, 0, 2, 3], mode="constant", constant_val=0.5),
         lambda x: F.pad(x, (2, 3, 1, 0), value=0.5), normal(2, 3, 4))  # fmt: skip
    for mode in ("reflect", "replicate"):
        case(f"pad.{mode}", lambda x, mode=mode: mb.pad(x=x, pad=[1, 2], mode=mode),
             lambda x, mode=mode: F.pad(x, (1, 2), mode=mode), normal(2, 3, 4))  # fmt: skip
    for lower, upper in ((-1, 0), (0, -1), (1, 2)):

        def band(x: Tensor, lower: int = lower, upper: int = upper) -> Tensor:
            x = x if lower < 0 else x.triu(-lower)
            return x if upper < 0 else x.tril(upper)

        case(f"band_part.{lower},{upper}", lambda x, a=lower, b=upper: mb.band_part(x=x, lower=a, upper=b), band,
             normal(2, 4, 5))  # fmt: skip
    case("fill.1", lambda x: mb.fill(shape=mb.shape(x=x), value=2.5), lambda x: torch.full_like(x, 2.5), normal(2, 3))
    alike = lambda x: mb.fill_like(ref_tensor=x, value=np.int32(3))
    case("fill_like.1", alike, lambda x: torch.full(x.shape, 3), normal(2, 3))
    ranged = lambda a, b: mb.range_1d(start=mb.squeeze(x=a), end=mb.squeeze(x=b), step=3)
    case("range_1d.int", ranged, lambda a, b: torch.arange(-2, 9, 3), np.int32([-2]), np.int32([9]))
    down = lambda a: mb.range_1d(start=mb.squeeze(x=a), end=np.float32(0.1), step=np.float32(-0.25))
    case("range_1d.float", down, lambda a: torch.arange(1.0, 0.1, -0.25), np.float32([1]))


def slices() -> None:
    plain = lambda x: mb.slice_by_index(x=x, begin=[0, 1, -3], end=[2, 3, -1])
    case("slice_by_index.1", plain, lambda x: x[0:2, 1:3, -3:-1], normal(2, 4, 5))
    stride = lambda x: mb.slice_by_index(x=x, begin=[0, 0], end=[0, 4], stride=[2, 3], end_mask=[True, False])
    case("slice_by_index.stride", stride, lambda x: x[::2, 0:4:3], normal(5, 6))
    backward = lambda x: mb.slice_by_index(
        x=x, begin=[0, 0], end=[0, 0], stride=[1, -1], begin_mask=[True] * 2, end_mask=[True] * 2
    )
    case("slice_by_index.back", backward, lambda x: x.flip(1), normal(2, 5))
    item = lambda x: mb.slice_by_index(
        x=x, begin=[0, -1], end=[0, 0], end_mask=[True, False], squeeze_mask=[False, True]
    )
    case("slice_by_index.item", item, lambda x: x[:, -1], normal(3, 4))
    first = lambda x: mb.slice_by_index(
        x=x, begin=[2, 0], end=[0, 2], begin_mask=[True, False], squeeze_mask=[True, False]
    )
    case("slice_by_index.first", first, lambda x: x[0, :2], normal(3, 4))
    computed = lambda x, b, e: mb.slice_by_index(x=x, begin=b, end=e)
    case("slice_by_index.run", computed, lambda x, b, e: x[1:3, 0:2], normal(3, 4), np.int32([1, 0]), np.int32([3, 2]))
    sized = lambda x, b: mb.slice_by_size(x=x, begin=b, size=[2, -1])
    case("slice_by_size.1", sized, lambda x, b: x[1:3, 2:], normal(3, 4), np.int32([1, 2]))
    update = lambda x, u, b: mb.slice_update(x=x, update=u, begin=b, end=[3, 0], end_mask=[False, True], stride=[1, 2])

    def replaced(x: Tensor, u: Tensor, b: Tensor) -> Tensor:
        y = x.clone()
        y[1:3, 0::2] = u
        return y

    case("slice_update.1", update, replaced, normal(4, 5), normal(2, 3), np.int32([1, 0]))
    row = lambda x, u: mb.slice_update(x=x, update=u, begin=[2, 0], end=[0, 5], squeeze_mask=[True, False])
    case("slice_update.row", row, lambda x, u: torch.cat([x[:2], u[None], x[3:]]), normal(4, 5), normal(5))


def indices() -> None:
    for axis in (0, 1, -1):
        picked = lambda x, i, axis=axis: mb.gather(x=x, indices=i, axis=axis)
        theirs = lambda x, i, axis=axis: x.index_select(axis, i.flatten()).unflatten(axis, i.shape)
        case(f"gather.{axis}", picked, theirs, normal(4, 5, 6), integers(0, 4, 2, 3))
    batch = lambda x, i: mb.gather(x=x, indices=i, axis=2, batch_dims=1)
    each = lambda x, i: torch.stack([a[:, b] for a, b in zip(x, i, strict=True)])
    case("gather.batch", batch, each, normal(3, 2, 6, 2), integers(0, 6, 3, 4))
    for axis in (0, 1, -1):
        along = lambda x, i, axis=axis: mb.gather_along_axis(x=x, indices=i, axis=axis)
        theirs = lambda x, i, axis=axis: x.gather(axis, i.long())
        shape = [4, 5, 6]
        shape[axis] = 3
        case(f"gather_along_axis.{axis}", along, theirs, normal(4, 5, 6), integers(0, 4, *shape))
    nd = lambda x, i: mb.gather_nd(x=x, indices=i)
    case("gather_nd.1", nd, lambda x, i: x[i[..., 0], i[..., 1]], normal(4, 5, 6), integers(0, 4, 2, 3, 2))
    batch_nd = lambda x, i: mb.gather_nd(x=x, indices=i, batch_dims=1)
    each = lambda x, i: torch.stack([a[b[:, 0], b[:, 1]] for a, b in zip(x, i, strict=True)])
    case("gather_nd.batch", batch_nd, each, normal(3, 4, 5, 2), integers(0, 4, 3, 6, 2))

    reduce = {"mul": "prod", "div": "prod", "max": "amax", "min": "amin"}
    for mode in ("add", "sub", "mul", "div", "max", "min", "update"):
        unique = np.int32([[2, 0], [3, 1]])  # which of several updates wins is not defined
        index = unique if mode == "update" else integers(0, 4, 2, 2)
        ours = lambda x, i, u, mode=mode: mb.scatter(data=x, indices=i, updates=u, axis=1, mode=mode)

        def theirs(x: Tensor, i: Tensor, u: Tensor, mode: str = mode) -> Tensor:
            i, u = i.flatten().long(), u.flatten(1, 2)
            if mode == "update":
                return x.index_copy(1, i, u)
            if mode in ("add", "sub"):
                return x.index_add(1, i, u, alpha=1 if mode == "add" else -1)
            return x.index_reduce(1, i, 1 / u if mode == "div" else u, reduce[mode])

        case(f"scatter.{mode}", ours, theirs, normal(3, 4, 5), index, positive(3, 2, 2, 5) - (mode != "div"))
    ours = lambda x, i, u: mb.scatter_along_axis(data=x, indices=i, updates=u, axis=1, mode="add")
    theirs = lambda x, i, u: x.scatter_add(1, i.long(), u)
    case("scatter_along_axis.1", ours, theirs, normal(3, 4), integers(0, 4, 3, 6), normal(3, 6))
    ours = lambda x, i, u: mb.scatter_nd(data=x, indices=i, updates=u, mode="add")
    theirs = lambda x, i, u: x.index_put((i[:, 0], i[:, 1]), u, accumulate=True)
    case("scatter_nd.add", ours, theirs, normal(3, 4, 5), integers(0, 3, 6, 2), normal(6, 5))
    replaced = lambda x, i, u: mb.scatter_nd(data=x, indices=i, updates=u, mode="update")
    theirs = lambda x, i, u: x.index_put((i[:, 0],), u)
    case("scatter_nd.update", replaced, theirs, normal(3, 4), np.int32([[2], [0]]), normal(2, 4))
    hot = lambda i: mb.one_hot(
        indices=i, one_hot_vector_size=5, axis=-1, on_value=np.float32(2), off_value=np.float32(-1)
    )
    case("one_hot.1", hot, lambda i: F.one_hot(i.long(), 5) * 3.0 - 1, integers(0, 5, 2, 3))
    front = lambda i: mb.one_hot(indices=i, one_hot_vector_size=4, axis=0)
    case("one_hot.front", front, lambda i: F.one_hot(i.long(), 4).movedim(-1, 0), integers(0, 4, 2, 3))


shapes()
slices()
indices()


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Package:
    return CASES.saved(tmp_path_factory.mktemp("shapes"))


@pytest.mark.parametrize("name", CASES.all)
def test_operation_computes_what_torch_does(package: Package, name: str) -> None:
    CASES.check(package, name)


@on_macos
@pytest.mark.parametrize("name", CASES.all)
def test_operation_computes_what_core_ml_does(package: Package, name: str) -> None:
    CASES.check_on_macos(package, name)


def test_every_operation_has_a_case() -> None:
    assert {name.split(".")[0] for name in (*CASES.all, *OTHERS.all)} == set(OPERATIONS)


@pytest.mark.parametrize("ios, allowed", [(16, True), (17, False), (18, False)])
def test_negative_indices_are_a_mistake_from_ios_17_on(tmp_path, ios: int, allowed: bool) -> None:
    inputs = {"x": tensor(4, 2), "i": tensor(2, dtype=np.int32)}
    function = load(
        save_functions(
            tmp_path / "m.mlpackage", {"main": (inputs, lambda x, i: mb.gather(x=x, indices=i, axis=0))}, ios
        )
    ).function()
    x = normal(4, 2)
    if allowed:
        found = function.run({"x": x, "i": np.int32([-1, 0])})
        np.testing.assert_array_equal(next(iter(found.values())), x[[-1, 0]])
    for index in ([0, 4], [-5, 0]) if allowed else ([0, 4], [-1, 0]):
        with pytest.raises(LordbaError, match=r"function main: gather \(output gather_0\).*outside of"):
            function.run({"x": x, "i": np.int32(index)})
