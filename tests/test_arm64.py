"""The C kernels on 64-bit ARM: cross-compiled, run under emulation of three processors.

scripts/arm64_toolchain.sh installs what is needed; with LORDBA_REQUIRE_ARM64=1 its absence is a failure, not a skip."""

import functools
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]
KERNELS = PROJECT / "backends" / "kernels"
COMPILER = "aarch64-linux-gnu-gcc"
EMULATOR = "qemu-aarch64-static"
SYSTEM = "/usr/aarch64-linux-gnu"
MISSING = [tool for tool in (COMPILER, EMULATOR) if shutil.which(tool) is None]
if MISSING and os.environ.get("LORDBA_REQUIRE_ARM64"):
    raise RuntimeError(
        f"LORDBA_REQUIRE_ARM64 is set and {', '.join(MISSING)} is missing: run scripts/arm64_toolchain.sh"
    )
pytestmark = pytest.mark.skipif(
    bool(MISSING), reason=f"NOT TESTED ON ARM: {', '.join(MISSING)} missing, run scripts/arm64_toolchain.sh"
)

SOURCES = sorted(path for path in KERNELS.glob("*.c") if not path.stem.startswith("avx"))
STRICT = ["-std=c11", "-Wall", "-Wextra", "-Werror", "-fno-builtin", "-ffp-contract=off"]
FLAGS = {"neon_i8mm.c": ["-march=armv8.2-a+i8mm"]}
# The levels that each processor has, the one that is chosen on it last. NEON is in all of them.
LEVELS = {"max": ["scalar", "neon", "i8mm"], "cortex-a76": ["scalar", "neon"], "cortex-a53": ["scalar", "neon"]}
FORCED = [(cpu, level) for cpu, levels in LEVELS.items() for level in levels]


def build(program: Path, flags: Sequence[str], kernels: Path = KERNELS) -> Path:
    """The check program, each of the kernels' files with the flags of its instruction set."""
    objects = []
    for source in [*(kernels / path.name for path in SOURCES), PROJECT / "tests" / "kernels_check.c"]:
        objects.append(program.with_name(f"{program.name}-{source.stem}.o"))
        own = [*flags, *FLAGS.get(source.name, []), f"-I{kernels}"]
        subprocess.run([COMPILER, *STRICT, *own, "-c", source, "-o", objects[-1]], check=True)
    subprocess.run([COMPILER, *flags, *objects, "-o", program, "-lm"], check=True)
    return program


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the check program as it ships (`check`) and with sanitizers (`sanitized`)."""
    folder = tmp_path_factory.mktemp("arm64")
    build(folder / "check", ["-O3", "-static"])
    build(folder / "sanitized", ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"])
    return folder


def emulate(program: Path, *arguments: str, cpu: str = "max") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}  # the leak check needs ptrace
    command = [EMULATOR, "-L", SYSTEM, "-cpu", cpu, program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)


@pytest.mark.parametrize("cpu", LEVELS)
def test_the_level_that_is_chosen(built, cpu):
    assert emulate(built / "check", "auto", cpu=cpu).stdout.strip() == LEVELS[cpu][-1]


@pytest.mark.parametrize("cpu", ["cortex-a76", "cortex-a53"])
def test_a_level_that_the_processor_lacks_is_refused(built, cpu):
    assert emulate(built / "check", "calls", "i8mm", cpu=cpu).returncode == 3


@functools.cache
def checked(program: Path, check: str, level: str, cpu: str) -> subprocess.CompletedProcess[str]:
    return emulate(program, check, level, cpu=cpu)


@pytest.mark.parametrize(("cpu", "level"), FORCED)
def test_calls_with_splits_strides_bases_and_special_values(built, cpu, level):
    result = checked(built / "check", "calls", level, cpu)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("cpu", LEVELS)
def test_every_shape_and_dtype_against_double_precision(built, cpu):
    result = checked(built / "check", "parity", LEVELS[cpu][-1], cpu)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(("cpu", "level"), FORCED)
def test_many_tokens_are_bitwise_those_of_the_scalar_twin(built, cpu, level):
    result = emulate(built / "check", "same", level, "scalar", cpu=cpu)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("tokens", ["1", "2", "7", "16"])
def test_few_tokens_are_bitwise_the_same_with_and_without_matrix_products(built, tokens):
    assert emulate(built / "check", "same", "i8mm", "neon", tokens).returncode == 0
    assert emulate(built / "check", "same", "neon", "scalar", tokens).returncode == 1, "negative control"


@pytest.mark.parametrize("level", ["neon", "i8mm"])
def test_no_bad_access_in_any_shape(built, level):
    result = emulate(built / "sanitized", "calls", level)
    assert result.returncode == 0, result.stdout + result.stderr


def test_damaged_blobs_are_errors_and_never_read_out_of_bounds(built):
    result = emulate(built / "sanitized", "hostile")
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_sanitizer_would_see_a_bad_read(built):
    assert "heap-buffer-overflow" in emulate(built / "sanitized", "overread").stderr


def test_a_level_of_another_architecture_is_refused(built):
    assert emulate(built / "check", "parity", "avx2").returncode == 3


@pytest.mark.parametrize(
    ("level", "source", "right", "wrong"),
    [("neon", "neon_planes.h", "0x0c04", "0x0c08"), ("i8mm", "neon_i8mm.c", "{4, 12, 20", "{4, 12, 21")],
)
def test_a_wrong_instruction_would_be_seen(tmp_path, level, source, right, wrong):
    """Negative control: with one byte of a table's index, or of the order of a plane, wrong, the sums are."""
    for path in KERNELS.iterdir():
        shutil.copy(path, tmp_path)
    text = (KERNELS / source).read_text()
    assert right in text
    (tmp_path / source).write_text(text.replace(right, wrong))
    program = build(tmp_path / "check", ["-O3", "-static"], tmp_path)
    assert emulate(program, "calls", level).returncode == 1


@pytest.mark.parametrize("source", [path for path in SOURCES if path.name != "dispatch.c"], ids=lambda path: path.name)
def test_hot_files_call_no_libc(source, tmp_path):
    compiled = tmp_path / "object.o"
    own = [*FLAGS.get(source.name, []), f"-I{KERNELS}"]
    subprocess.run([COMPILER, *STRICT, *own, "-O3", "-fPIC", "-c", source, "-o", compiled], check=True)
    listed = subprocess.run(["aarch64-linux-gnu-nm", "-u", compiled], capture_output=True, text=True, check=True)
    undefined = listed.stdout.split()[1::2]
    assert [symbol for symbol in undefined if not symbol.startswith("lordba_")] == []
