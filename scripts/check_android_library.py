#!/usr/bin/env python3
"""Checks that a shared library is one that Android 8.0 to 16 loads on arm64: reads it with readelf.

example: scripts/check_android_library.py liblordba_ort.so --soname liblordba_ort.so --exports RegisterCustomOps
"""

import argparse
import re
import subprocess
import sys
from pathlib import Path

PAGE = 16384
MIN_SDK = 26


def readelf(library: Path, *options: str) -> str:
    return subprocess.run(["readelf", "--wide", *options, library], check=True, capture_output=True, text=True).stdout


def symbols(library: Path) -> tuple[set[str], set[str]]:
    """Names of the dynamic symbols: those defined here, and those asked of other libraries."""
    defined, wanted = set(), set()
    for line in readelf(library, "--dyn-syms").splitlines():
        columns = line.split()
        if len(columns) < 8 or not columns[0][:-1].isdigit() or columns[4] == "LOCAL":
            continue
        (wanted if columns[6] == "UND" else defined).add(columns[7].partition("@")[0])
    return defined, wanted


def allowed_imports(table: Path) -> tuple[set[str], set[str]]:
    """Symbols of a table (name, library, API level) that the app's oldest Android has, and the libraries."""
    rows = [line.split() for line in table.read_text().splitlines() if line and not line.startswith("#")]
    return {name for name, _, level in rows if int(level) <= MIN_SDK}, {library for _, library, _ in rows}


def problems(library: Path, soname: str, exports: set[str], imports: Path | None, linux: bool) -> list[str]:
    """Why Android would refuse the library, or what it holds beyond what it should."""
    found = []
    header, dynamic = readelf(library, "--file-header"), readelf(library, "--dynamic")
    segments = readelf(library, "--program-headers")
    if "AArch64" not in header or "ELF64" not in header or "DYN" not in header:
        found.append("is no 64-bit ARM shared library")
    loads = [line.split() for line in segments.splitlines() if line.split()[:1] == ["LOAD"]]
    if not linux and any(int(load[-1], 16) < PAGE or int(load[-1], 16) % PAGE for load in loads):
        found.append(f"has segments that are not aligned to {PAGE} bytes: {[load[-1] for load in loads]}")
    if any("W" in load[-2] + load[-3] and "E" in load[-2] + load[-3] for load in loads):
        found.append("has a segment that is both writable and executable")
    if re.search(r"GNU_STACK.*RWE", segments):
        found.append("asks for an executable stack")
    if "TEXTREL" in dynamic:
        found.append("has text relocations")
    name = re.findall(r"\(SONAME\).*\[(.*)\]", dynamic)
    if name != [soname]:
        found.append(f"is called {name}, not {soname}")
    if not linux and ("RUNPATH" in dynamic or "RPATH" in dynamic):
        found.append("names folders of the machine that built it (RUNPATH)")
    defined, wanted = symbols(library)
    if defined != exports:
        found.append(f"exports {sorted(defined - exports)} too much and lacks {sorted(exports - defined)}")
    if imports is not None:
        names, libraries = allowed_imports(imports)
        needed = set(re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic))
        if wanted - names:
            found.append(f"asks Android for {sorted(wanted - names)}: not in API {MIN_SDK} or not in {imports.name}")
        if needed - libraries:
            found.append(f"needs the libraries {sorted(needed - libraries)}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", type=Path)
    parser.add_argument("--soname", required=True, help="the name that it must have")
    parser.add_argument("--exports", nargs="+", required=True, help="the symbols that it must export, and no others")
    parser.add_argument("--imports", type=Path, help="a table of the symbols that it may ask of Android")
    parser.add_argument(
        "--linux", action="store_true", help="a build for ARM Linux: its page size and paths are its own"
    )
    options = parser.parse_args()
    found = problems(options.library, options.soname, set(options.exports), options.imports, options.linux)
    for problem in found:
        print(f"error: {options.library.name} {problem}", file=sys.stderr)
    if not found:
        pages = "for Linux" if options.linux else "pages of 16 KB"
        print(f"{options.library.name}: arm64, {pages}, exports {len(options.exports)} symbols and no others")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
