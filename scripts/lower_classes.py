#!/usr/bin/env python3
"""Rewrites the Java 17 classes of a jar so that Debian's dx takes them and Android 8 can run them, as D8 does.

dx reads class files up to version 52 (Java 8). Since version 55 classes of one nest reach each other's private members
directly, which Android refuses: private members become package-private, and the nest's attributes go. Call sites of
invokedynamic stay (dx turns them into invoke-custom); they are named, for what they need at run time may be missing.

example: scripts/lower_classes.py classes.jar lowered.jar
"""

import argparse
import struct
import sys
import zipfile
from dataclasses import dataclass

JAVA_8 = 52
PRIVATE = 0x0002
INTERFACE = 0x0200
DROPPED = {"NestHost", "NestMembers", "PermittedSubclasses"}
# Bytes of each kind of constant after its tag; a text (1) says its own length.
CONSTANT_BYTES = {3: 4, 4: 4, 5: 8, 6: 8, 7: 2, 8: 2, 9: 4, 10: 4, 11: 4, 12: 4, 15: 3, 16: 2, 17: 4, 18: 4}
CONSTANT_BYTES |= {19: 2, 20: 2}
WIDE = (5, 6)
INVOKE_DYNAMIC = 18


@dataclass
class Reader:
    """Goes through a class file and copies what it passes."""

    data: bytes
    at: int = 0

    def take(self, n: int) -> bytes:
        part = self.data[self.at : self.at + n]
        if len(part) != n:
            raise ValueError("is truncated")
        self.at += n
        return part

    def u2(self) -> int:
        return int(struct.unpack(">H", self.take(2))[0])


@dataclass
class Lowered:
    """A rewritten class; `opened` are the methods that were private, `methods` the others, each with its descriptor."""

    name: str
    parent: str
    data: bytes
    opened: set[str]
    methods: set[str]
    dynamic: bool


def lower(data: bytes) -> Lowered:
    reader = Reader(data)
    if reader.take(4) != b"\xca\xfe\xba\xbe":
        raise ValueError("is no class file")
    reader.take(4)
    texts, classes, kinds = read_constants(reader)
    constants = data[8 : reader.at]
    flags, name, parent = reader.u2(), reader.u2(), reader.u2()
    interfaces = reader.take(2 * reader.u2())
    out = bytearray(data[:4] + struct.pack(">HH", 0, JAVA_8) + constants)
    out += struct.pack(">HHHH", flags, name, parent, len(interfaces) // 2) + interfaces
    opened: set[str] = set()
    methods: set[str] = set()
    for kind in ("fields", "methods"):
        count = reader.u2()
        out += struct.pack(">H", count)
        for _ in range(count):
            access, member, descriptor = reader.u2(), reader.u2(), reader.u2()
            signature = texts[member] + texts[descriptor]
            if kind == "methods" and access & PRIVATE and flags & INTERFACE:
                raise ValueError(f"has a private method in an interface, {signature}, which this cannot open")
            if kind == "methods" and not signature.startswith("<"):
                (opened if access & PRIVATE else methods).add(signature)
            out += struct.pack(">HHH", access & ~PRIVATE, member, descriptor) + read_attributes(reader, texts)
    out += read_attributes(reader, texts)
    if reader.at != len(data):
        raise ValueError("has bytes behind its end")
    names = texts[classes[name]], texts[classes[parent]]
    return Lowered(*names, bytes(out), opened, methods, dynamic=INVOKE_DYNAMIC in kinds)


def read_constants(reader: Reader) -> tuple[dict[int, str], dict[int, int], set[int]]:
    """The texts by their index, the index of each class's name, and the kinds of constants that occur."""
    texts, classes, kinds = {0: ""}, {0: 0}, set()
    index, count = 1, reader.u2()
    while index < count:
        tag = reader.take(1)[0]
        kinds.add(tag)
        if tag == 1:
            texts[index] = reader.take(reader.u2()).decode("latin-1")  # compared alone
        elif tag in CONSTANT_BYTES:
            value = reader.take(CONSTANT_BYTES[tag])
            if tag == 7:
                classes[index] = struct.unpack(">H", value)[0]
        else:
            raise ValueError(f"has a constant of the unknown kind {tag}")
        index += 2 if tag in WIDE else 1
    return texts, classes, kinds


def read_attributes(reader: Reader, texts: dict[int, str]) -> bytes:
    """The attributes of a member or class without those of nests."""
    kept = []
    for _ in range(reader.u2()):
        head = reader.take(6)
        name, size = struct.unpack(">HI", head)
        body = reader.take(size)
        if texts[name] not in DROPPED:
            kept.append(head + body)
    return struct.pack(">H", len(kept)) + b"".join(kept)


def check_overrides(lowered: list[Lowered]) -> None:
    """An opened method must not override, or be overridden by, one of the same signature: calls would go astray."""
    by_name = {item.name: item for item in lowered}
    for item in lowered:
        ancestor = by_name.get(item.parent)
        while ancestor is not None:
            clash = item.opened & (ancestor.opened | ancestor.methods) | item.methods & ancestor.opened
            if clash:
                raise ValueError(f"{item.name}: {min(clash)} would override {ancestor.name}'s")
            ancestor = by_name.get(ancestor.parent)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a jar")
    parser.add_argument("target", help="the jar to write")
    options = parser.parse_args()
    lowered = []
    with zipfile.ZipFile(options.source) as source, zipfile.ZipFile(options.target, "w") as target:
        for entry in source.namelist():
            if not entry.endswith(".class") or entry.startswith("META-INF/") or entry.endswith("module-info.class"):
                continue  # variants for newer Java, and what Android has no use for
            data = source.read(entry)
            if data[6:8] <= struct.pack(">H", JAVA_8):
                target.writestr(entry, data)
                continue
            try:
                lowered.append(lower(data))
            except (ValueError, KeyError) as error:
                print(f"error: {options.source}: {entry} {error}", file=sys.stderr)
                return 1
            target.writestr(entry, lowered[-1].data)
    try:
        check_overrides(lowered)
    except ValueError as error:
        print(f"error: {options.source}: {error}", file=sys.stderr)
        return 1
    dynamic = [item.name for item in lowered if item.dynamic]
    print(f"{len(lowered)} classes lowered to version {JAVA_8}; invokedynamic stays in: {', '.join(dynamic) or 'none'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
