"""llama.cpp and ik_llama.cpp with their bench tools, compiled for this machine below target/peers.

The sources are those that the Python packages llama-cpp-python and ik-llama-cpp-python carry.
"""

import pathlib
import shutil
import subprocess
import sys
import tarfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
FOLDER = ROOT / "target/peers"

# Package, version, the folder of the sources in it, and the programs that are built of them.
SOURCES = {
    "llama.cpp": (
        "llama-cpp-python", "0.3.36", "vendor/llama.cpp",
        ["llama-bench", "llama-batched-bench", "llama-server", "llama-completion", "llama-quantize"],
    ),
    "ik_llama.cpp": (
        "ik-llama-cpp-python", "0.1.5", "vendor/ik_llama.cpp",
        ["llama-bench", "llama-quantize"],
    ),
}
OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release", "GGML_NATIVE": "ON", "BUILD_SHARED_LIBS": "OFF",
    "LLAMA_CURL": "OFF", "LLAMA_OPENSSL": "OFF", "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_UI": "OFF", "LLAMA_BUILD_WEBUI": "OFF",
}
# Files that a source distribution lacks, below its sources.
MISSING = {
    "ik_llama.cpp": {
        "common/cmake/build-info-gen-cpp.cmake": """\
set(BUILD_NUMBER 0)
set(BUILD_COMMIT unknown)
set(BUILD_COMPILER unknown)
set(BUILD_TARGET unknown)
set(HERE ${CMAKE_CURRENT_LIST_DIR}/..)
configure_file(${HERE}/build-info.cpp.in ${HERE}/build-info.cpp)
""",
    },
}
# What the environment of the scripts here needs.
REQUIREMENTS = ["cmake==3.31.6", "ninja==1.11.1.4", "numpy==2.2.6", "safetensors==0.8.0"]


def run(command, log):
    """Runs a command of a build; what it says goes to a file."""
    with open(log, "a", encoding="utf-8") as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, check=False)
    if done.returncode != 0:
        sys.exit(f"{command[0]} failed; see {log}")


def unpack(package, version):
    """The folder of a package's source distribution."""
    folder = FOLDER / f"{package.replace('-', '_')}-{version}"
    if folder.exists():
        return folder
    FOLDER.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command = [*pip, "--no-deps", "--no-binary", package, "--dest", FOLDER, f"{package}=={version}"]
    subprocess.run(command, check=True)
    with tarfile.open(f"{folder}.tar.gz") as archive:
        archive.extractall(FOLDER, filter="data")
    return folder


def install(peer):
    """A function from a program's name to its path; builds what is not there yet."""
    package, version, source, programs = SOURCES[peer]
    build = FOLDER / f"{peer}-{version}"
    paths = {program: build / "bin" / program for program in programs}
    if not all(path.exists() for path in paths.values()):
        print(f"building {peer} of {package} {version}", file=sys.stderr)
        log = FOLDER / f"{peer}.log"
        options = [f"-D{name}={value}" for name, value in OPTIONS.items()]
        cmake, ninja = (shutil.which(tool) for tool in ("cmake", "ninja"))
        sources = unpack(package, version) / source
        for name, text in MISSING.get(peer, {}).items():
            (sources / name).parent.mkdir(parents=True, exist_ok=True)
            (sources / name).write_text(text, encoding="utf-8")
        run([cmake, "-S", sources, "-B", build, "-G", "Ninja", *options], log)
        run([ninja, "-C", build, *programs], log)
    return lambda program: paths[program]
