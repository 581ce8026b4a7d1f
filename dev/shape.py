#!/usr/bin/env python3
"""The shape of the code: modules, the depth of their imports, imports against the order, sizes of files and functions.

    dev/shape.py [FOLDER]        e.g. of another checkout; without it, this one
"""

import pathlib
import re
import statistics
import sys

ROOT = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else pathlib.Path(__file__).parent.parent)
CRATES = ["chat/wire/src", "chat/src", "chat-client/src", "testkit/src", "bench/src"]


def code(path):
    """The text of a file without its tests."""
    return path.read_text().split("#[cfg(test)]\nmod tests")[0]


def top_modules(source):
    """The modules that lib.rs declares, in its order; those of a program without one."""
    declares = source / "lib.rs" if (source / "lib.rs").exists() else source / "main.rs"
    return re.findall(r"^(?:pub )?mod (\w+);", declares.read_text(), re.M)


def module_of(source, path):
    return path.relative_to(source).parts[0].removesuffix(".rs")


def imports(source, modules):
    """Which module imports which."""
    found = {module: set() for module in modules}
    for path in source.rglob("*.rs"):
        own = module_of(source, path)
        if own in found:
            for name in re.findall(r"\bcrate::(\w+)", re.sub(r"^\s*//.*$", "", code(path), flags=re.M)):
                if name in found and name != own:
                    found[own].add(name)
            for block in re.findall(r"use crate::\{(.*?)\};", code(path), re.S):
                found[own] |= {name for name in re.findall(r"(\w+)(?:::|,|$)", block) if name in found and name != own}
    return found


def depth(module, arrows, seen=()):
    """The longest chain of imports below a module."""
    if module in seen:
        return 0
    return 1 + max((depth(below, arrows, (*seen, module)) for below in arrows[module]), default=0)


def functions(text):
    """The lengths of functions, in lines."""
    lines = text.split("\n")
    for start, line in enumerate(lines):
        head = re.match(r"(\s*)(?:pub(?:\(\w+\))? )?(?:const |async )*fn \w+", line)
        if not head:
            continue
        for end in range(start, len(lines)):
            # A signature without a body, or a body on one line.
            if end == start and line.rstrip().endswith(("}", ";")):
                break
            if lines[end] == head[1] + "}":
                yield end - start + 1
                break
            if lines[end].startswith(head[1] + ")") and lines[end].rstrip().endswith(";"):
                break


def sizes(values):
    ordered = sorted(values)
    return f"median {statistics.median(ordered):.0f}, p90 {ordered[len(ordered) * 9 // 10]}, largest {ordered[-1]}"


print("| crate | modules | longest chain of imports | imports | against the order |\n|---|---|---|---|---|")
for crate in CRATES:
    source = ROOT / crate
    if source.exists():
        modules = top_modules(source)
        arrows = imports(source, modules)
        upwards = sum(modules.index(to) > modules.index(by) for by, tos in arrows.items() for to in tos)
        deepest = max((depth(module, arrows) for module in modules), default=0)
        print(f"| {crate} | {len(modules)} | {deepest} | {sum(map(len, arrows.values()))} | {upwards} |")

files = [path for crate in CRATES for path in (ROOT / crate).rglob("*.rs")]
lengths = [len(path.read_text().splitlines()) for path in files]
of_functions = [length for path in files for length in functions(code(path))]
long = sum(length > 60 for length in of_functions)
print(f"\n{len(files)} files of {sum(lengths)} lines: {sizes(lengths)}; over 500 lines: {sum(length > 500 for length in lengths)}")
print(f"{len(of_functions)} functions: {sizes(of_functions)}; over 60 lines: {long} ({100 * long / len(of_functions):.1f} %)")
