"""The C kernels on 64-bit ARM: cross-compiled, run under emulation of three processors.

scripts/arm64_toolchain.sh installs what is needed; with LORDBA_REQUIRE_ARM64=1 its absence is a failure, not a skip."""

import functools
import os
import shutil
import subprocess
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
STRICT = ["-std=c11", "-Wall", "-Wextra", "-Werror", "-fno-builtin", "-ffp-contract=off", f"-I{KERNELS}"]
# What each processor has and which level is chosen on it: NEON is in all of them, no level above it is worth code yet.
CHOSEN = {"max": "neon", "cortex-a76": "neon", "cortex-a53": "neon"}
LEVELS = ["scalar", "neon"]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the check program as it ships (`check`) and with sanitizers (`sanitized`)."""
    folder = tmp_path_factory.mktemp("arm64")
    for name, flags in {
        "check": ["-O3", "-static"],
        "sanitized": ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    }.items():
        command = [
            COMPILER,
            *STRICT,
            *flags,
            *SOURCES,
            PROJECT / "tests" / "kernels_check.c",
            "-o",
            folder / name,
            "-lm",
        ]
        subprocess.run(command, check=True)
    return folder


def emulate(program: Path, *arguments: str, cpu: str = "max") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}  # the leak check needs ptrace
    command = [EMULATOR, "-L", SYSTEM, "-cpu", cpu, program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)


@pytest.mark.parametrize("cpu", CHOSEN)
def test_the_level_that_is_chosen(built, cpu):
    assert emulate(built / "check", "auto", cpu=cpu).stdout.strip() == CHOSEN[cpu]


@functools.cache
def checked(program: Path, check: str, level: str, cpu: str) -> subprocess.CompletedProcess[str]:
    return emulate(program, check, level, cpu=cpu)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("cpu", CHOSEN)
def test_calls_with_splits_strides_bases_and_special_values(built, cpu, level):
    result = checked(built / "check", "calls", level, cpu)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("cpu", CHOSEN)
def test_every_shape_and_dtype_against_double_precision(built, cpu):
    result = checked(built / "check", "parity", CHOSEN[cpu], cpu)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("cpu", CHOSEN)
def test_many_tokens_are_bitwise_those_of_the_scalar_twin(built, cpu):
    for level in LEVELS:
        result = emulate(built / "check", "same", level, "scalar", cpu=cpu)
        assert result.returncode == 0, f"{level}: {result.stdout}"


def test_no_bad_access_in_any_shape(built):
    result = emulate(built / "sanitized", "calls", "neon")
    assert result.returncode == 0, result.stdout + result.stderr


def test_damaged_blobs_are_errors_and_never_read_out_of_bounds(built):
    result = emulate(built / "sanitized", "hostile")
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_sanitizer_would_see_a_bad_read(built):
    assert "heap-buffer-overflow" in emulate(built / "sanitized", "overread").stderr


def test_a_level_of_another_architecture_is_refused(built):
    assert emulate(built / "check", "parity", "avx2").returncode == 3


def test_a_wrong_instruction_would_be_seen(built, tmp_path):
    """Negative control: with one byte of a table's index wrong, the sums are."""
    source = (KERNELS / "neon_planes.h").read_text()
    assert "0x0c04" in source
    for path in KERNELS.iterdir():
        shutil.copy(path, tmp_path)
    (tmp_path / "neon_planes.h").write_text(source.replace("0x0c04", "0x0c08"))
    sources = [tmp_path / path.name for path in SOURCES]
    check = PROJECT / "tests" / "kernels_check.c"
    flags = [*STRICT[:-1], f"-I{tmp_path}", "-O3", "-static"]
    subprocess.run([COMPILER, *flags, *sources, check, "-o", tmp_path / "check", "-lm"], check=True)
    assert emulate(tmp_path / "check", "calls", "neon").returncode == 1


@pytest.mark.parametrize("source", [path for path in SOURCES if path.name != "dispatch.c"], ids=lambda path: path.name)
def test_hot_files_call_no_libc(source, tmp_path):
    compiled = tmp_path / "object.o"
    subprocess.run([COMPILER, *STRICT, "-O3", "-fPIC", "-c", source, "-o", compiled], check=True)
    listed = subprocess.run(["aarch64-linux-gnu-nm", "-u", compiled], capture_output=True, text=True, check=True)
    undefined = listed.stdout.split()[1::2]
    assert [symbol for symbol in undefined if not symbol.startswith("lordba_")] == []
