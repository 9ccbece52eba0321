"""The C kernels by themselves: parity, bounds under sanitizers, and no call into libc from the hot files."""

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[1] / "backends" / "kernels"
X86 = platform.machine() in ("x86_64", "AMD64")
FLAGS = {
    "blob.c": [],
    "dispatch.c": [],
    "kernels.c": [],
    "meaning.c": [],
    "prepare.c": [],
    "rank_lanes.c": [],
    "scalar.c": [],
    "token_lanes.c": [],
    "avx2.c": ["-mavx2", "-mfma", "-mf16c"],
    "avx512.c": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"],
}
SOURCES = [name for name in FLAGS if X86 or not name.startswith("avx")]
COMPILER = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
STRICT = ["-std=c11", "-Wall", "-Wextra", "-Werror", "-fno-builtin", "-ffp-contract=off", f"-I{KERNELS}"]

pytestmark = pytest.mark.skipif(COMPILER is None, reason="NO C COMPILER: the kernels are not checked under sanitizers")


def compile_object(source: Path, target: Path, *flags: str) -> Path:
    subprocess.run([COMPILER, *STRICT, *flags, *FLAGS.get(source.name, []), "-c", source, "-o", target], check=True)
    return target


@pytest.fixture(scope="module")
def checker(tmp_path_factory) -> Path:
    """The check program, with address and undefined-behaviour sanitizers."""
    folder = tmp_path_factory.mktemp("kernels")
    sanitizers = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    sources = [KERNELS / name for name in SOURCES] + [Path(__file__).with_name("kernels_check.c")]
    objects = [compile_object(source, folder / f"{source.name}.o", *sanitizers) for source in sources]
    subprocess.run([COMPILER, *sanitizers, *objects, "-o", folder / "check", "-lm"], check=True)
    return folder / "check"


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512"])
@pytest.mark.parametrize("check", ["parity", "calls"])
def test_every_shape_dtype_and_split_against_double_precision(checker, check, isa):
    result = run(checker, check, isa)
    if result.returncode == 3 and isa != "scalar":
        pytest.skip(f"this CPU has no {isa}")
    assert result.returncode == 0, result.stdout + result.stderr


def test_instruction_sets_that_add_in_one_order_are_bitwise_equal(checker):
    result = run(checker, "same", "avx2", "scalar")
    if result.returncode == 3:
        pytest.skip("this CPU has no avx2")
    assert result.returncode == 0


def test_another_order_of_additions_is_seen(checker):
    result = run(checker, "same", "avx512", "scalar")
    if result.returncode == 3:
        pytest.skip("this CPU has no avx512")
    assert result.returncode == 1


def test_damaged_blobs_are_errors_and_never_read_out_of_bounds(checker):
    result = run(checker, "hostile")
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_sanitizer_would_see_a_bad_read(checker):
    assert "heap-buffer-overflow" in run(checker, "overread").stderr


def test_unknown_instruction_set_is_refused(checker):
    assert run(checker, "parity", "avx1024").returncode == 3


@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm")
@pytest.mark.parametrize("name", [name for name in SOURCES if name != "dispatch.c"])
def test_hot_files_call_no_libc(name, tmp_path):
    compiled = compile_object(KERNELS / name, tmp_path / "object.o", "-O3", "-fPIC")
    undefined = run("nm", "-u", compiled).stdout.split()[1::2]
    assert [symbol for symbol in undefined if not symbol.startswith("lordba_")] in ([], ["_GLOBAL_OFFSET_TABLE_"])
