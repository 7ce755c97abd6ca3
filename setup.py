"""Builds one CPU library per instruction set and the CUDA library into sparse_attn/_native, and the host engine into kvcache/tiers.

torch is located, never imported.

    pip install --no-build-isolation .                     # build isolation would download a second torch
    SPARSE_ATTN_BUILD=none pip install --no-build-isolation .      # pure Python: reference kernels only
    SPARSE_ATTN_BUILD=avx512,generic python setup.py build_ext --inplace

SPARSE_ATTN_BUILD is a comma list of instruction sets, or `none`, or `default`; `emulated` adds the AMX kernels on emulated
tiles and the CUDA kernels on emulated threads, for tests on machines without them. `cuda` is part of the default where torch is a
CUDA build. CXX names the compiler; nvcc is looked for in CUDA_HOME and PATH. Objects whose sources are unchanged are not rebuilt.
The host engine needs the headers of Python and of pybind11, its own or those that come with torch. Where the CUDA library or the
host engine cannot be built the package does without.
"""

import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
X86 = platform.machine().lower() in ("x86_64", "amd64")
AVX512 = ["-march=x86-64-v4", "-mprefer-vector-width=512"]
FLAGS = {"generic": []}
if X86:
    FLAGS |= {
        "avx2": ["-march=x86-64-v3"],
        "avx512": AVX512,
        "amx": [*AVX512, "-mavx512bf16", "-mavx512vnni", "-mamx-tile", "-mamx-bf16", "-DSA_AMX"],
    }
DEFAULT = tuple(FLAGS)
if X86:
    FLAGS["emulated"] = [*AVX512, "-DSA_AMX", "-DSA_AMX_EMULATE"]
# an sm_80 binary runs on 8.x, sm_100 on 10.x, sm_120 on 12.x; wgmma needs the a of sm_90a; PTX of the last for what comes later
ARCHS = ("80", "90a", "100", "120")
FLAGS |= {"cuda": ["-DSA_CUDA"], "cuda_emulated": ["-DSA_CUDA", "-DSA_CUDA_EMULATED"]}
CUDA = ("cuda", "cuda_emulated")
WITH = {"emulated": ("emulated", "cuda_emulated")} if X86 else {"emulated": ("cuda_emulated",)}
NAMES = {"emulated": "cpu_amx_emulated", "cuda": "cuda", "cuda_emulated": "cuda_emulated"}
COMMON = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast",
          "-fno-gnu-unique", "-Wall", "-Wextra", "-Wno-psabi", "-Wno-unknown-pragmas", "-Wno-restrict"]
NVCC = ["-std=c++20", "-O3", "-lineinfo", "--expt-relaxed-constexpr", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall"]
SOURCES = sorted(p.relative_to(ROOT) for p in (ROOT / "csrc" / "cpu").glob("*.cpp"))
CUDA_SOURCES = sorted(p.relative_to(ROOT) for p in (ROOT / "csrc" / "cuda").iterdir() if p.suffix in (".cu", ".cpp"))
HOST = "kvcache.tiers._host"
HOST_FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
HOST_SOURCES = sorted(p.relative_to(ROOT) for p in (ROOT / "csrc" / "host").glob("*.cpp"))


def say(sentence):
    print(f"sparse_attn: {sentence}", file=sys.stderr, flush=True)


def wanted():
    """Instruction sets asked for by SPARSE_ATTN_BUILD."""
    names = [n.strip() for n in os.environ.get("SPARSE_ATTN_BUILD", "default").lower().split(",") if n.strip()]
    if names == ["none"]:
        return []
    default = (*DEFAULT, *(["cuda"] if torch_cuda() else []))
    names = [isa for n in names for isa in (default if n == "default" else WITH.get(n, (n,)))]
    unknown = sorted(set(names) - set(FLAGS))
    if unknown:
        sys.exit(f"SPARSE_ATTN_BUILD names {', '.join(unknown)}; use none, default, or a list of {', '.join(FLAGS)}")
    # the generic library also answers what this CPU can do
    return list(dict.fromkeys([*names, "generic"]))


def compiler():
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and shutil.which(name.split()[0]):
            return name.split()
    sys.exit("no C++ compiler found (tried $CXX, c++, g++, clang++); install one, or set SPARSE_ATTN_BUILD=none for the "
             "pure Python package")


def torch_root():
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        sys.exit("torch is not importable here, so the kernels cannot be built; install torch>=2.11 first and pass "
                 "--no-build-isolation to pip, or set SPARSE_ATTN_BUILD=none")
    return Path(found.origin).parent


def torch_cuda():
    """The CUDA version that torch was built for, or None."""
    found = importlib.util.find_spec("torch")
    version = Path(found.origin).parent / "version.py" if found is not None and found.origin is not None else None
    text = version.read_text() if version is not None and version.exists() else ""
    said = re.search(r"^cuda\b.*= *'([\d.]+)'", text, re.MULTILINE)
    return said and said[1]


def nvcc():
    """The compiler of CUDA, or None."""
    homes = [Path(os.environ[name]) / "bin" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    return next(filter(None, (shutil.which("nvcc", path=path) for path in (*map(str, homes), None))), None)


def targets(compiler):
    """Options for the architectures that this nvcc knows."""
    listed = subprocess.run([compiler, "--list-gpu-code"], text=True, capture_output=True).stdout.split()
    known = [arch for arch in ARCHS if f"sm_{arch.rstrip('a')}" in listed]
    if known != list(ARCHS):
        say(f"{compiler} knows sm_{', sm_'.join(known)} only; GPUs of sm_{', sm_'.join(set(ARCHS) - set(known))} need a newer one")
    ptx = [f"-gencode=arch=compute_{known[-1]},code=compute_{known[-1]}"] if known else []
    return [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in known] + ptx


def pybind11_headers():
    """Where they are, or None."""
    found = importlib.util.find_spec("pybind11")
    own = Path(found.origin).parent / "include" if found is not None and found.origin is not None else None
    folders = [folder for folder in (own, torch_root() / "include") if folder is not None]
    return next((folder for folder in folders if (folder / "pybind11" / "pybind11.h").exists()), None)


def accepts(cxx, flags):
    """Does this compiler know the flags?"""
    probe = subprocess.run([*cxx, *flags, "-x", "c++", "-fsyntax-only", "-"], input="", text=True, capture_output=True)
    return probe.returncode == 0


def stale(target, depfile, stamp, signature):
    """Is the object older than anything it was made from, or made by another command?"""
    if not (target.exists() and depfile.exists() and stamp.exists()) or stamp.read_text() != signature:
        return True
    made = target.stat().st_mtime
    inputs = depfile.read_text().replace("\\\n", " ").split(":", 1)[1].split()
    return any(not (ROOT / p).exists() or (ROOT / p).stat().st_mtime > made for p in inputs)


def uses_tiles(source):
    """Does it include amx.h, directly or not?"""
    found, todo = set(), [ROOT / source]
    while todo:
        path = todo.pop()
        named = {(path.parent / name).resolve() for name in re.findall(r'^#include "(.+)"', path.read_text(), re.MULTILINE)}
        todo += named - found
        found |= named
    return ROOT / "csrc" / "cpu" / "amx.h" in found


def objects_of(isa):
    """Source, and the instruction set that it is compiled for, of each object of a library: AMX only where it makes a difference."""
    if isa in CUDA:
        return [(source, isa) for source in CUDA_SOURCES]
    own = [isa not in ("amx", "emulated") or source.stem == "library" or uses_tiles(source) for source in SOURCES]
    return [(source, isa if mine else "avx512") for source, mine in zip(SOURCES, own)]


class BuildLibraries(build_ext):
    """Compiles plain shared libraries: but for the host engine they hold no Python symbol, so one build serves every Python."""

    def get_ext_filename(self, name):
        # asked with the module's whole name, and with its last part
        host = name.rpartition(".")[2] == HOST.rpartition(".")[2]
        return super().get_ext_filename(name) if host else os.path.join(*name.split(".")) + ".so"

    def run(self):
        if self.inplace:
            (ROOT / "sparse_attn" / "_native").mkdir(exist_ok=True)
        super().run()

    def build_extensions(self):
        self.cxx, self.torch = compiler(), torch_root()
        self.build_host()
        self.nvcc = self.gencode = None
        self.failed = {}  # library that is done without: why
        if any(ext.isa == "cuda" for ext in self.extensions if ext.name != HOST):
            self.nvcc = nvcc()
            self.gencode = targets(self.nvcc) if self.nvcc else []
            if not self.gencode:
                self.failed["cuda"] = "no nvcc that knows these GPUs was found in PATH or CUDA_HOME"
        jobs, links = [], []
        for ext in [ext for ext in self.extensions if ext.name != HOST]:
            isa = ext.isa
            if not accepts(self.cxx, FLAGS[isa]):
                say(f"{self.cxx[0]} does not know {' '.join(FLAGS[isa])}; skipping the {isa} library (use a newer compiler)")
                self.extensions.remove(ext)
                continue
            made = [(of, source, Path(self.build_temp) / of / f"{source.stem}.o") for source, of in objects_of(isa)]
            jobs += [job for job in made if job not in jobs]
            links.append((isa, [target for _, _, target in made], Path(self.get_ext_fullpath(ext.name))))
        # torch's headers and nvcc's passes are the slowest: first, so that the pool ends level
        jobs.sort(key=lambda job: job[1].stem != "library" and job[0] != "cuda")
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", min(os.cpu_count() or 1, 8)))) as pool:
            list(pool.map(lambda job: self.unless_failed(self.compile_one, *job), jobs))
        for link in links:
            self.unless_failed(self.link_one, *link)
        for isa, why in self.failed.items():
            say(f"{why}; going on without the {isa} library, whose place Triton and the references take")
            self.extensions = [ext for ext in self.extensions if ext.name == HOST or ext.isa != isa]

    def unless_failed(self, step, isa, *rest):
        """A step of a library; the package can do without the CUDA library."""
        if isa in self.failed:
            return
        try:
            step(isa, *rest)
        except SystemExit as error:
            if isa != "cuda":
                raise
            self.failed[isa] = str(error)

    def compile_one(self, isa, source, target):
        # one name for all: symbols stay inside their library, and libraries share objects
        flags = [*FLAGS[isa], "-DSA_NAMESPACE=sparse_attn_kernels"]
        if isa == "cuda" and source.suffix == ".cu":
            command = [self.nvcc, *self.host_compiler(), *NVCC, *self.gencode, *flags, "-c", str(source)]
        else:
            command = [*self.cxx, *COMMON, *flags, *(["-x", "c++"] if source.suffix == ".cu" else []), "-c", str(source)]
        if source.stem == "library":
            # 2.11: the oldest torch whose stable ABI has what library.cpp uses
            command += [f"-DSA_LIBRARY=sparse_attn_{library_name(isa)}"]
            command += ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-isystem", str(self.torch / "include")]
        self.compile(command, target, f"{source} for {isa}")

    def host_compiler(self):
        return ["-ccbin", self.cxx[0]] if os.environ.get("CXX") else []

    def compile(self, command, target, what):
        """An object file, unless it is there already."""
        signature = hashlib.sha256(" ".join(command).encode()).hexdigest()
        stamp = target.with_suffix(".cmd")
        if not self.force and not stale(target, target.with_suffix(".d"), stamp, signature):
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        fresh, depfile = target.with_suffix(f".{os.getpid()}.o"), target.with_suffix(f".{os.getpid()}.d")
        self.call([*command, "-o", str(fresh), "-MMD", "-MF", str(depfile)], what)
        # whole or not at all, also when two builds run at once
        depfile.replace(target.with_suffix(".d"))
        fresh.replace(target)
        stamp.write_text(signature)

    def link_one(self, isa, objects, library):
        # symbols stay inside: the same std templates are compiled for another CPU in the library next door
        hide = Path(self.build_temp) / "hide.map"
        hide.write_text("{ local: *; };\n")
        linker, version = self.cxx, f"-Wl,--version-script={hide}"
        if isa == "cuda":  # which knows where its own libraries are
            linker, version = [self.nvcc, *self.host_compiler(), "-cudart=static"], f"-Xlinker=--version-script={hide}"
        flags = [version, "-L", str(self.torch / "lib"), "-ltorch_cpu"]
        self.link(objects, library, flags, f"{isa} library", linker)

    def link(self, objects, library, flags, what, linker=None):
        """A shared library, unless it is there already."""
        if not self.force and library.exists() and all(o.stat().st_mtime <= library.stat().st_mtime for o in objects):
            return
        library.parent.mkdir(parents=True, exist_ok=True)
        fresh = library.with_suffix(f".{os.getpid()}.new")
        self.call([*(linker or self.cxx), "-shared", "-o", str(fresh), *map(str, objects), *flags], what)
        fresh.replace(library)  # a process that has the old one mapped keeps it

    def build_host(self):
        """The host engine; what it lacks is said, and the package does without."""
        headers, python = pybind11_headers(), sysconfig.get_path("include")
        include = ["-isystem", str(headers), "-isystem", python]
        objects = [Path(self.build_temp) / f"host-{sys.implementation.cache_tag}" / f"{source.stem}.o" for source in HOST_SOURCES]
        try:
            if headers is None:
                sys.exit("the headers of pybind11 are not here; pip install pybind11")
            for source, target in zip(HOST_SOURCES, objects):
                self.compile([*self.cxx, *HOST_FLAGS, *include, "-c", str(source)], target, f"{source}")
            self.link(objects, Path(self.get_ext_fullpath(HOST)), ["-pthread"], "host engine")
        except SystemExit as error:
            say(f"{error}; going on without the host engine, whose place Python takes")
            self.extensions = [ext for ext in self.extensions if ext.name != HOST]

    def call(self, command, what):
        start = time.monotonic()
        done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
        if done.stderr.strip():
            print(done.stderr, file=sys.stderr)
        if done.returncode:
            sys.exit(f"compiling {what} failed: {' '.join(command)}")
        say(f"compiled {what} in {time.monotonic() - start:.0f} s")


def library_name(isa):
    return NAMES.get(isa, f"cpu_{isa}")


def library(isa):
    ext = Extension(f"sparse_attn._native.{library_name(isa)}", [str(s) for s in (CUDA_SOURCES if isa in CUDA else SOURCES)])
    ext.isa = isa
    return ext


libraries = [library(isa) for isa in wanted()]
if libraries:
    libraries.append(Extension(HOST, [str(s) for s in HOST_SOURCES]))
setup(ext_modules=libraries, cmdclass={"build_ext": BuildLibraries})
