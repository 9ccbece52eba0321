#!/usr/bin/env python3
"""Adds files to aapt's package, native libraries uncompressed at multiples of 16 KB; or checks that they are there.

Android maps such libraries out of the APK. Debian's zipalign knows pages of 4 KB alone, and apksigner moves what does
not say how it is aligned, so each entry says it in the field that Google's tools use (0xd935).

example: scripts/pack_apk.py resources.apk folder unsigned.apk; scripts/pack_apk.py --check app.apk
"""

import argparse
import struct
import sys
import zipfile
from pathlib import Path

PAGE = 16384
FIELD = 0xD935
HEADER = 30
DATE = (1981, 1, 1, 1, 1, 2)  # what Google's tools write: the same files give the same bytes


def alignment(name: str) -> int:
    return PAGE if name.endswith(".so") else 4


def add(target: zipfile.ZipFile, name: str, data: bytes, stored: bool) -> None:
    entry = zipfile.ZipInfo(name, DATE)
    entry.external_attr = 0o100644 << 16
    if stored:
        assert target.fp is not None
        multiple = alignment(name)
        start = target.fp.tell() + HEADER + len(name.encode()) + 6
        padding = -start % multiple
        entry.extra = struct.pack("<HHH", FIELD, 2 + padding, multiple) + bytes(padding)
    else:
        entry.compress_type = zipfile.ZIP_DEFLATED
    target.writestr(entry, data)


def pack(resources: Path, folder: Path, output: Path) -> None:
    with zipfile.ZipFile(resources) as source, zipfile.ZipFile(output, "w") as target:
        for name in source.namelist():
            add(target, name, source.read(name), stored=name == "resources.arsc")
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                add(target, str(path.relative_to(folder)), path.read_bytes(), stored=path.suffix == ".so")


def check(apk: Path) -> list[str]:
    """Why Android would not map the native libraries out of the APK."""
    problems = []
    with zipfile.ZipFile(apk) as archive, apk.open("rb") as file:
        libraries = [entry for entry in archive.infolist() if entry.filename.endswith(".so")]
        for entry in libraries:
            file.seek(entry.header_offset + 26)
            name, extra = struct.unpack("<HH", file.read(4))
            start = entry.header_offset + HEADER + name + extra
            if entry.compress_type != zipfile.ZIP_STORED:
                problems.append(f"{entry.filename} is compressed")
            if start % PAGE:
                problems.append(f"{entry.filename} begins at {start}, which is no multiple of {PAGE}")
        if not libraries:
            problems.append("holds no native library")
        elif not problems:
            print(f"{apk.name}: {len(libraries)} libraries, uncompressed, at multiples of {PAGE} bytes")
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", type=Path, metavar="APK", help="check this APK and do nothing else")
    parser.add_argument("paths", nargs="*", type=Path, metavar="RESOURCES FOLDER OUTPUT")
    options = parser.parse_args()
    if options.check:
        problems = check(options.check)
        for problem in problems:
            print(f"error: {options.check}: {problem}", file=sys.stderr)
        return 1 if problems else 0
    if len(options.paths) != 3:
        parser.error("expected aapt's package, a folder and the APK to write")
    pack(*options.paths)
    return 0


if __name__ == "__main__":
    sys.exit(main())
