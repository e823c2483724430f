"""The kernels on processors other than this one: cross-compiled, and run by qemu's user emulation."""

import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CPU = HERE.parent / "src" / "pennyweight" / "kernels" / "cpu"
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"


@pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"no {COMPILER} (Debian: g++-aarch64-linux-gnu)")
def test_neon_gives_the_bits_of_plain(tmp_path):
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off", "-fno-math-errno", f"-I{CPU}"]
    objects = []
    for name, defined in (("plain", []), ("neon", ["-DPENNYWEIGHT_NEON"])):
        objects.append(tmp_path / f"{name}.o")
        command = [COMPILER, *flags, *defined, f"-DPENNYWEIGHT_NAME={name}", "-c", CPU / "isa.cpp", "-o", objects[-1]]
        subprocess.run(command, check=True)
    own = {
        "module.cpp",
        "module_binary.cpp",
        "module_integer.cpp",
        "module_optimizer.cpp",
        "module_sparse.cpp",
        "isa.cpp",
        "feedback.cpp",
    }  # needs Python, or is above
    sources = sorted(path for path in CPU.glob("*.cpp") if path.name not in own)
    program = tmp_path / "compare"
    inputs = [*sources, HERE / "native" / "compare.cpp", *objects]
    subprocess.run(
        [COMPILER, *flags, "-DPENNYWEIGHT_HAS_NEON", *inputs, "-o", program, "-static", "-pthread"], check=True
    )
    if shutil.which(EMULATOR) is None:
        pytest.skip(f"compiled, but {EMULATOR} is not installed to run it (Debian: qemu-user)")
    done = subprocess.run([EMULATOR, program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split() == ["plain", "neon"]
