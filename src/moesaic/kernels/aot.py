"""Ahead-of-time compilation of every Triton kernel, with no GPU: registers, spills, shared memory.

Each kernel module of this package has a function ``aot_cases() -> list[AotCase]`` that lists its
kernels (functions called ``*_kernel``; device helpers have other names) with the signatures,
constants and options they are launched with. `compile_case` compiles one of them for one
architecture and says what ptxas said; `problems` says what is wrong with it. As a program it
compiles all of them, two at a time, and prints a table:

    python -m moesaic.kernels.aot --quick
    python -m moesaic.kernels.aot --only combine --arch 90 --json report.json

A case is its runtime arguments and its constants; all pointers count as 16-byte aligned, and of the
integers those named in `aligned` count as multiples of 16, as the launcher would specialise them:

    AotCase(
        name="combine/bf16",
        fn=combine_kernel,
        signature={"out_ptr": "*bf16", "rows_ptr": "*bf16", "hidden": "i32"},
        constexprs={"TOP_K": 8, "BLOCK_H": 512},
        options={"num_warps": 2},
        aligned=("hidden",),
    )
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import multiprocessing
import os
import pkgutil
import re
import sys
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
GLUON_TRITON = ((3, 6), (3, 8))
WGMMA_SERIALISED = re.compile(r"C75(?:1[0-7])\b.*")


@dataclass(frozen=True, kw_only=True)
class AotCase:
    """One compilation of one kernel.

    Args:
        name: unique, "module/variant".
        fn: the `@triton.jit` or `@gluon.jit` function.
        signature: runtime arguments by name: "*bf16", "i32", "fp32", "tensordesc<bf16[128, 64]>"
            (in Gluon with the layout: f"tensordesc<bf16[128, 64],{layout!r}>").
        constexprs: the constants, and optional arguments that are None, by name.
        options: num_warps, num_stages, maxnreg, launch_pdl, ...
        archs: compute capabilities, of 80, 90, 100.
        aligned: integer arguments that are multiples of 16.
        unaligned: pointer arguments that are not 16-byte aligned.
        gluon: compile as Gluon; skipped outside Triton `GLUON_TRITON`.
        wgmma: on 90 the PTX must have wgmma and ptxas must not have serialised it.
        ptx: texts that the PTX must contain, by capability.
        quick: part of the short run of the default tests.
    """

    name: str
    fn: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    archs: tuple[int, ...] = (80, 90, 100)
    aligned: tuple[str, ...] = ()
    unaligned: tuple[str, ...] = ()
    gluon: bool = False
    wgmma: bool = False
    ptx: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    quick: bool = True


@dataclass(frozen=True, kw_only=True)
class AotReport:
    """What the compiler said of one case on one architecture; sizes in bytes."""

    name: str
    arch: int
    triton: str
    registers: int = 0
    spill: int = 0
    stack: int = 0
    shared: int = 0
    problems: tuple[str, ...] = ()
    skipped: str = ""


def typed_signature(case: AotCase) -> dict[str, str]:
    """The types of all arguments in the order of the kernel's parameters.

    Raises:
        ValueError: the case names an unknown parameter, misses one, or gives one twice.
    """
    names = list(case.fn.arg_names)
    unknown = sorted(({*case.signature, *case.constexprs, *case.aligned}) - set(names))
    missing = [n for n in names if (n in case.signature) == (n in case.constexprs)]
    if unknown or missing:
        raise ValueError(
            f"{case.name}: parameters {names} must each be in signature or constexprs, once; "
            f"unknown {unknown}, missing or double {missing}"
        )
    return {n: case.signature.get(n, "constexpr") for n in names}


def _attributes(case: AotCase, signature: Mapping[str, str]) -> dict[tuple[int], list[list[Any]]]:
    divisible = [["tt.divisibility", 16]]
    return {
        (index,): divisible
        for index, (name, kind) in enumerate(signature.items())
        if name in case.aligned or (kind.startswith("*") and name not in case.unaligned)
    }


def problems(case: AotCase, arch: int, log: str, ptx: str, shared: int) -> list[str]:
    """What is wrong with a compiled case, from the log of ptxas, the PTX and the shared bytes."""
    found = []
    if "bytes spill stores" not in log:
        found.append("ptxas left no log")
    spill, stack = _memory(log)
    if spill:
        found.append(f"{spill} bytes spilled")
    if stack and not spill:
        found.append(f"{stack} bytes of stack")
    if shared > SHARED_LIMIT[arch]:
        found.append(f"{shared} bytes of shared memory, limit {SHARED_LIMIT[arch]}")
    if case.wgmma and arch == 90:
        if "wgmma.mma_async" not in ptx:
            found.append("no wgmma in the PTX")
        found += [f"wgmma serialised: {m.group(0)}" for m in WGMMA_SERIALISED.finditer(log)]
    found += [f"{text!r} not in the PTX" for text in case.ptx.get(arch, ()) if text not in ptx]
    return found


def _memory(log: str) -> tuple[int, int]:
    """Spilled and stack bytes, summed over the functions in a log of ptxas."""
    spill = sum(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", log)))
    return spill, sum(map(int, re.findall(r"(\d+) bytes stack frame", log)))


def gluon_works() -> bool:
    """Whether this Triton is one that Gluon kernels are written for."""
    import triton

    low, high = GLUON_TRITON
    major, minor = triton.__version__.split(".")[:2]
    return low <= (int(major), int(minor)) <= high


def compile_case(case: AotCase, arch: int) -> AotReport:
    """Compile one case for one architecture; a failure of the compiler is a problem, not an error.

    Raises:
        RuntimeError: Triton's interpreter is on, so kernels are Python functions.
        ValueError: see `typed_signature`.
    """
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise RuntimeError("ahead-of-time compilation needs TRITON_INTERPRET=0")
    os.environ |= {"TRITON_DUMP_PTXAS_LOG": "1", "TRITON_ALWAYS_COMPILE": "1"}
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    name, version = case.name, triton.__version__
    if case.gluon and not gluon_works():
        return AotReport(name=name, arch=arch, triton=version, skipped="Gluon needs Triton 3.6-3.8")
    make_source: Any = ASTSource
    if case.gluon:
        from triton.experimental.gluon._runtime import GluonASTSource

        make_source = GluonASTSource
    signature = typed_signature(case)
    source = make_source(case.fn, signature, dict(case.constexprs), _attributes(case, signature))
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            target = GPUTarget("cuda", arch, 32)
            kernel = triton.compile(source, target=target, options=dict(case.options))
    except Exception as error:
        told = f"does not compile: {type(error).__name__}: {error}"[:2000]
        return AotReport(name=name, arch=arch, triton=version, problems=(told,))
    log = printed.getvalue()
    spill, stack = _memory(log)
    shared = int(kernel.metadata.shared)
    return AotReport(
        name=name,
        arch=arch,
        triton=version,
        registers=max(map(int, re.findall(r"Used (\d+) registers", log)), default=0),
        spill=spill,
        stack=stack,
        shared=shared,
        problems=tuple(problems(case, arch, log, kernel.asm["ptx"], shared)),
    )


def kernel_modules() -> list[str]:
    """Names of the modules of this package and of those inside it."""
    package = __package__ or "moesaic.kernels"
    paths = importlib.import_module(package).__path__
    names = {module.name for module in pkgutil.walk_packages(paths, f"{package}.")}
    return sorted(names - {f"{package}.aot"})


def all_cases(modules: list[str] | None = None) -> dict[str, AotCase]:
    """The cases of `modules` (default: of the package) by name.

    Raises:
        ValueError: two cases have one name.
    """
    cases: dict[str, AotCase] = {}
    for module in kernel_modules() if modules is None else modules:
        list_cases = getattr(importlib.import_module(module), "aot_cases", list)
        for case in list_cases():
            if case.name in cases:
                raise ValueError(f"two cases are called {case.name!r}")
            cases[case.name] = case
    return cases


def unlisted_kernels(modules: list[str] | None = None) -> list[str]:
    """Kernels (functions called ``*_kernel``) of `modules` that no case compiles for 80, 90 or 100.

    For a Gluon kernel, which is written for one architecture, any will do, and outside the Tritons
    of `GLUON_TRITON` none is asked for.
    """
    from triton.runtime.jit import JITFunction

    listed: dict[int, set[int]] = {}
    for case in all_cases(modules).values():
        archs = set(SHARED_LIMIT) if case.gluon else set(case.archs)
        listed.setdefault(id(case.fn), set()).update(archs)
    return [
        f"{module}.{name} for sm_{arch}"
        for module in (kernel_modules() if modules is None else modules)
        for name, fn in vars(importlib.import_module(module)).items()
        if isinstance(fn, JITFunction) and name.endswith("_kernel") and fn.__module__ == module
        if gluon_works() or not fn.is_gluon()
        for arch in SHARED_LIMIT
        if arch not in listed.get(id(fn), ())
    ]


def _compile_named(modules: list[str] | None, name: str, arch: int) -> AotReport:
    return compile_case(all_cases(modules)[name], arch)


def compile_all(
    modules: list[str] | None = None,
    *,
    quick: bool = False,
    only: str = "",
    archs: tuple[int, ...] = (80, 90, 100),
    workers: int = 2,
) -> list[AotReport]:
    """Compile the cases whose name contains `only`, `workers` at a time, in the order listed."""
    chosen = [
        (case.name, arch)
        for case in all_cases(modules).values()
        for arch in case.archs
        if arch in archs and only in case.name and (case.quick or not quick)
    ]
    if not chosen:
        raise ValueError(f"no case for only={only!r}, quick={quick}, archs={archs}")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        jobs = [pool.submit(_compile_named, modules, name, arch) for name, arch in chosen]
        return [job.result() for job in jobs]


def main(argv: list[str] | None = None) -> int:
    """Compile, print a table, write JSON; status 1 at a problem or a kernel without a case."""
    parser = argparse.ArgumentParser(prog="python -m moesaic.kernels.aot", description=main.__doc__)
    parser.add_argument("--module", action="append", help="module with aot_cases(); default: all")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--quick", action="store_true", help="only the cases marked quick")
    parser.add_argument("--arch", type=int, action="append", choices=sorted(SHARED_LIMIT))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", help="also write the reports to this file")
    args = parser.parse_args(argv)
    reports = compile_all(
        args.module,
        quick=args.quick,
        only=args.only,
        archs=tuple(args.arch or SHARED_LIMIT),
        workers=args.workers,
    )
    print(f"{'case':<44} {'sm':>4} {'regs':>5} {'spill':>6} {'shared':>7}  triton")
    for r in reports:
        note = r.skipped or "; ".join(r.problems)
        row = f"{r.name:<44} {r.arch:>4} {r.registers:>5} {r.spill:>6} {r.shared:>7}  {r.triton}"
        print(f"{row}  {note}".rstrip())
    unlisted = unlisted_kernels(args.module)
    if unlisted:
        print(f"no case compiles {', '.join(unlisted)}")
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            told = {"reports": [asdict(r) for r in reports], "unlisted": unlisted}
            json.dump(told, file, indent=1)
    return int(bool(unlisted) or any(r.problems for r in reports))


if __name__ == "__main__":
    sys.exit(main())
