#!/bin/sh
# Builds the CPU part of ggml, the library of llama.cpp's kernels, for this very processor, from the sources that
# llama-cpp-python ships; benchmarks/kernels.py then times its products too. Nothing is installed.
#
#     sh benchmarks/build_ggml.sh [FOLDER]       # default: benchmarks/out/llama.cpp, where kernels.py looks
#
# Needs pip (PYTHON: whose, default python3), CMake and a C++ compiler with OpenMP; 77 MB are fetched; several minutes.
set -eu
version=0.3.36
folder=${1:-$(dirname "$0")/out/llama.cpp}
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)

"${PYTHON:-python3}" -m pip download --no-deps --no-binary llama-cpp-python -d "$folder" "llama-cpp-python==$version"
tar -xzf "$folder/llama_cpp_python-$version.tar.gz" -C "$folder"
cmake -S "$folder/llama_cpp_python-$version/vendor/llama.cpp" -B "$folder/build" -DCMAKE_BUILD_TYPE=Release \
  -DBUILD_SHARED_LIBS=ON -DGGML_NATIVE=ON -DGGML_OPENMP=ON -DGGML_CCACHE=OFF \
  -DLLAMA_BUILD_COMMON=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_EXAMPLES=OFF \
  -DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_APP=OFF
cmake --build "$folder/build" --target ggml-base ggml-cpu -j "${JOBS:-1}"
echo "built: $folder/build/bin"
