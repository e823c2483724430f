// Bindings of the kernels of signs. Words cross as int64, of which PyTorch can do more than of uint64.

#include <nanobind/stl/pair.h>
#include <nanobind/stl/variant.h>

#include <algorithm>
#include <utility>
#include <variant>

#include "binary.h"
#include "bindings.h"

namespace {

constexpr std::size_t most = (std::size_t(1) << 31) - 1;  // that int32 counts

const std::uint64_t *words(const std::int64_t *data) { return reinterpret_cast<const std::uint64_t *>(data); }
std::uint64_t *words(std::int64_t *data) { return reinterpret_cast<std::uint64_t *>(data); }

std::size_t words_of(std::size_t columns) { return (columns + 63) / 64; }

// a * b * ..., and `most` + 1 where that would be more: sizes from outside must not wrap around.
template <typename... Sizes>
std::size_t product(Sizes... sizes) {
    std::size_t all = 1;
    for (const std::size_t size : {static_cast<std::size_t>(sizes)...}) {
        if (size == 0) return 0;
        all = all > most / size ? most + 1 : all * size;
    }
    return all;
}

// Bits beyond the columns would count where the operands differ in them.
void require_filled_with_zeros(const std::int64_t *data, std::size_t rows, std::size_t cols, const char *what) {
    if (cols % 64 == 0) return;
    const std::size_t count = words_of(cols);
    const std::uint64_t beyond = ~std::uint64_t(0) << cols % 64;
    std::uint64_t found = 0;
    for (std::size_t r = 0; r < rows; ++r) found |= words(data)[r * count + count - 1] & beyond;
    require(found == 0, what);
}

using Integers = Output<std::int32_t, 2>;
using Floats = Output<float, 2>;
using Signs = Output<std::int64_t, 2>;

// What becomes of [rows][outputs] products; which one it is, the type of the output says.
pennyweight::BinaryOutput output(std::variant<Integers, Floats, Signs> &out, std::size_t rows, std::size_t outputs, const Maybe<float, 1> &scale,
                                 const Maybe<float, 1> &bias, const Maybe<std::int32_t, 1> &threshold, const Maybe<std::uint8_t, 1> &flip) {
    pennyweight::BinaryOutput to{};
    std::size_t shape[2] = {0, 0}, wanted = outputs;
    if (Integers *integers = std::get_if<Integers>(&out)) {
        to.integers = integers->data();
        shape[0] = integers->shape(0), shape[1] = integers->shape(1);
    } else if (Floats *floats = std::get_if<Floats>(&out)) {
        to.floats = floats->data();
        to.scale = data_or_null(scale), to.bias = data_or_null(bias);
        shape[0] = floats->shape(0), shape[1] = floats->shape(1);
        require((!scale || scale->shape(0) == outputs) && (!bias || bias->shape(0) == outputs), "binary: scale and bias must have one number for each output");
    } else {
        Signs &signs = std::get<Signs>(out);
        to.signs = words(signs.data());
        shape[0] = signs.shape(0), shape[1] = signs.shape(1), wanted = words_of(outputs);
        require(threshold && flip && threshold->shape(0) == outputs && flip->shape(0) == outputs,
                "binary: threshold and flip must have one number for each output");
        to.threshold = threshold->data(), to.flip = flip->data();
    }
    require(shape[0] == rows && shape[1] == wanted, "binary: the output has the wrong shape");
    return to;
}

void pack(Array<float, 2> x, Maybe<float, 1> threshold, Signs out, unsigned threads) {
    const std::size_t rows = x.shape(0), cols = x.shape(1);
    require(out.shape(0) == rows && out.shape(1) == words_of(cols) && (!threshold || threshold->shape(0) == cols), "binary pack: shapes do not fit each other");
    nb::gil_scoped_release release;
    pennyweight::binary_pack(x.data(), data_or_null(threshold), rows, cols, words(out.data()), threads);
}

void linear(Array<std::int64_t, 2> x, Array<std::int64_t, 2> w, std::size_t cols, std::variant<Integers, Floats, Signs> out, Maybe<float, 1> scale,
            Maybe<float, 1> bias, Maybe<std::int32_t, 1> threshold, Maybe<std::uint8_t, 1> flip, unsigned threads) {
    const std::size_t rows = x.shape(0), outputs = w.shape(0), count = words_of(cols);
    require(cols <= most && x.shape(1) == count && w.shape(1) == count, "binary linear: x and w must have the words that the columns fill");
    require_filled_with_zeros(x.data(), rows, cols, "binary linear: x has bits beyond its columns");
    require_filled_with_zeros(w.data(), outputs, cols, "binary linear: w has bits beyond its columns");
    const pennyweight::BinaryOutput to = output(out, rows, outputs, scale, bias, threshold, flip);
    nb::gil_scoped_release release;
    pennyweight::binary_linear(words(x.data()), rows, words(w.data()), outputs, count, cols, to, threads);
}

using Pair = std::pair<std::size_t, std::size_t>;

void convolution(Array<std::int64_t, 5> x, Array<std::int64_t, 4> w, std::size_t channels, Pair stride, Pair padding, Pair dilation, bool padding_is_zero,
                 std::variant<Integers, Floats, Signs> out, Maybe<float, 1> scale, Maybe<float, 1> bias, Maybe<std::int32_t, 1> threshold,
                 Maybe<std::uint8_t, 1> flip, unsigned threads) {
    const pennyweight::BinaryConvolution c{x.shape(0), x.shape(1), x.shape(2), x.shape(3), x.shape(4), channels, w.shape(0),
                                           {w.shape(1), w.shape(2)}, {stride.first, stride.second}, {padding.first, padding.second},
                                           {dilation.first, dilation.second}, padding_is_zero};
    require(c.words == words_of(channels) && w.shape(3) == c.words, "binary convolution: x and w must have the words that the channels fill");
    require(c.groups > 0 && c.outputs % c.groups == 0, "binary convolution: the outputs must be a multiple of the groups");
    for (int i = 0; i < 2; ++i) {
        constexpr std::size_t sane = std::size_t(1) << 24;  // so that no sum or product of them wraps around
        require(c.kernel[i] > 0 && c.stride[i] > 0 && c.dilation[i] > 0, "binary convolution: kernel, stride and dilation must be at least 1");
        require(c.kernel[i] < sane && c.stride[i] < sane && c.dilation[i] < sane && c.padding[i] < sane && (i == 0 ? c.height : c.width) < most,
                "binary convolution: kernel, stride, padding or dilation is too large");
        require(c.positions(i) >= 0, "binary convolution: the kernel is larger than the padded input");
    }
    require(product(c.kernel[0], c.kernel[1], channels) <= most, "binary convolution: too many products in a sum");
    const std::size_t each = product(static_cast<std::size_t>(c.positions(0)), static_cast<std::size_t>(c.positions(1)));
    require(product(c.images, each) <= most, "binary convolution: too many positions");
    require_filled_with_zeros(x.data(), x.size() / std::max<std::size_t>(1, c.words), channels, "binary convolution: x has bits beyond its channels");
    require_filled_with_zeros(w.data(), w.size() / std::max<std::size_t>(1, c.words), channels, "binary convolution: w has bits beyond its channels");
    const pennyweight::BinaryOutput to = output(out, c.images * each, c.outputs, scale, bias, threshold, flip);
    nb::gil_scoped_release release;
    pennyweight::binary_convolution(c, words(x.data()), words(w.data()), to, threads);
}

void distances(Array<std::int64_t, 3> x, Array<std::int64_t, 3> y, Integers out, unsigned threads) {
    require(x.shape(2) == y.shape(2), "binary distances: x and y must have equally many words");
    require(x.shape(1) < 32 && y.shape(1) < 32 &&
                product((std::size_t(1) << x.shape(1)) - 1, (std::size_t(1) << y.shape(1)) - 1, product(x.shape(2), std::size_t(64))) <= most,
            "binary distances: the planes and words are too many for int32");
    require(out.shape(0) == x.shape(0) && out.shape(1) == y.shape(0), "binary distances: the output has the wrong shape");
    nb::gil_scoped_release release;
    pennyweight::binary_distances(words(x.data()), x.shape(0), x.shape(1), words(y.data()), y.shape(0), y.shape(1), x.shape(2), out.data(), threads);
}

}  // namespace

void bind_binary(nb::module_ &m) {
    m.def("binary_pack", &pack, nb::arg("x"), nb::arg("threshold").none(), nb::arg("out").noconvert(), nb::arg("threads"), "Writes the bits x >= threshold.");
    m.def("binary_linear", &linear, nb::arg("x"), nb::arg("w"), nb::arg("cols"), nb::arg("out").noconvert(), nb::arg("scale").none(), nb::arg("bias").none(),
          nb::arg("threshold").none(), nb::arg("flip").none(), nb::arg("threads"), "Writes the products of signs: int32, scaled float32, or signs in int64 words.");
    m.def("binary_convolution", &convolution, nb::arg("x"), nb::arg("w"), nb::arg("channels"), nb::arg("stride"), nb::arg("padding"), nb::arg("dilation"),
          nb::arg("padding_is_zero"), nb::arg("out").noconvert(), nb::arg("scale").none(), nb::arg("bias").none(), nb::arg("threshold").none(),
          nb::arg("flip").none(), nb::arg("threads"), "Writes the convolution of signs, one row for each position.");
    m.def("binary_distances", &distances, nb::arg("x"), nb::arg("y"), nb::arg("out").noconvert(), nb::arg("threads"),
          "Writes the distances of numbers of several bit planes.");
}
