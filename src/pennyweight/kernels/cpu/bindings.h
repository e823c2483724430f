#pragma once
// What the bindings share: arrays of the CPU in C order, and the check of their sizes.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include <optional>

namespace nb = nanobind;

template <typename T, int N>
using Array = nb::ndarray<const T, nb::ndim<N>, nb::c_contig, nb::device::cpu>;
template <typename T, int N>
using Output = nb::ndarray<T, nb::ndim<N>, nb::c_contig, nb::device::cpu>;
template <typename T, int N>
using Maybe = std::optional<Array<T, N>>;

template <typename A>
static inline auto data_or_null(const std::optional<A> &array) -> decltype(array->data()) {
    return array ? array->data() : nullptr;
}

static inline void require(bool fits, const char *what) {
    if (!fits) throw nb::value_error(what);
}
