"""Parses every Swift file below a folder with tree-sitter: what can be said of them where there is no Swift."""

import sys
from collections.abc import Iterator
from pathlib import Path

import tree_sitter
import tree_sitter_swift


def errors(node: tree_sitter.Node) -> Iterator[tree_sitter.Node]:
    """The outermost nodes that the grammar does not know, and those that it misses."""
    if node.type == "ERROR" or node.is_missing:
        yield node
    elif node.has_error:
        for child in node.children:
            yield from errors(child)


def main(folder: Path) -> None:
    parser = tree_sitter.Parser(tree_sitter.Language(tree_sitter_swift.language()))
    files = sorted(folder.rglob("*.swift"))
    found = 0
    for file in files:
        for node in errors(parser.parse(file.read_bytes()).root_node):
            found += 1
            print(f"{file}:{node.start_point.row + 1}: cannot be parsed here: {(node.text or b'')[:60]!r}")
    print(f"{len(files)} files, {found} errors")
    sys.exit(0 if files and not found else 1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
