// The bindings of sparse weights; see kernels/sparse.py.

#include <cstdint>
#include <vector>

#include "bindings.h"
#include "sparse.h"

// A sparse weight as Python holds it. Every size and index is checked when it is made, so that a damaged one ends in an
// error here and not in a read of foreign memory; what it refers to must not change afterwards.
class SparseWeight {
public:
    SparseWeight(Array<std::uint16_t, 1> column, Maybe<float, 1> floats, Maybe<std::uint16_t, 1> halves, Maybe<std::int8_t, 1> bytes,
                 Array<std::int64_t, 1> start, Array<std::int32_t, 1> order, Maybe<float, 1> scale, std::size_t cols)
        : column_(column), floats_(floats), halves_(halves), bytes_(bytes), start_(start), order_(order), scale_(scale) {
        require(cols < (std::size_t(1) << 16), "a sparse weight has at most 65535 columns");
        w_ = {column.data(), data_or_null(floats), data_or_null(halves), data_or_null(bytes), start.data(), order.data(), data_or_null(scale), order.shape(0), cols};
        const std::size_t count = column.shape(0), values = floats ? floats->shape(0) : halves ? halves->shape(0) : bytes ? bytes->shape(0) : count + 1;
        require(values == count, "the values of a sparse weight have the wrong size");
        require(int(bool(floats)) + int(bool(halves)) + int(bool(bytes)) == 1, "a sparse weight has values of one type");
        require(start.shape(0) == w_.blocks() + 1 && (!scale || scale->shape(0) == w_.rows), "a sparse weight has the wrong number of blocks or scales");
        require(count % pennyweight::sparse_lanes == 0 && w_.start[0] == 0 && w_.start[w_.blocks()] == std::int64_t(count / pennyweight::sparse_lanes),
                "the blocks of a sparse weight are out of order");
        for (std::size_t b = 0; b < w_.blocks(); ++b) require(w_.start[b] <= w_.start[b + 1], "the blocks of a sparse weight are out of order");
        std::size_t largest = 0;
        for (std::size_t i = 0; i < count; ++i) largest = w_.column[i] > largest ? w_.column[i] : largest;
        require(largest <= cols, "an entry of a sparse weight lies outside of it");
        std::vector<bool> seen(w_.rows);
        for (std::size_t r = 0; r < w_.rows; ++r) {
            const std::int32_t row = w_.order[r];
            require(row >= 0 && std::size_t(row) < w_.rows && !seen[std::size_t(row)], "the rows of a sparse weight are no permutation");
            seen[std::size_t(row)] = true;
        }
    }

    void linear(Array<float, 2> x, Maybe<float, 1> bias, Output<float, 2> y, unsigned threads) const {
        require(x.shape(1) == w_.cols && y.shape(0) == x.shape(0) && y.shape(1) == w_.rows && (!bias || bias->shape(0) == w_.rows),
                "sparse linear: shapes do not fit each other");
        nb::gil_scoped_release release;
        pennyweight::sparse_linear(w_, x.data(), x.shape(0), data_or_null(bias), y.data(), threads);
    }

private:
    Array<std::uint16_t, 1> column_;
    Maybe<float, 1> floats_;
    Maybe<std::uint16_t, 1> halves_;
    Maybe<std::int8_t, 1> bytes_;
    Array<std::int64_t, 1> start_;
    Array<std::int32_t, 1> order_;
    Maybe<float, 1> scale_;
    pennyweight::Sparse w_{};
};

void bind_sparse(nb::module_ &m) {
    nb::class_<SparseWeight>(m, "SparseWeight", "A sparse weight in the kernels' arrangement; see kernels/sparse.py.")
        .def(nb::init<Array<std::uint16_t, 1>, Maybe<float, 1>, Maybe<std::uint16_t, 1>, Maybe<std::int8_t, 1>, Array<std::int64_t, 1>,
                      Array<std::int32_t, 1>, Maybe<float, 1>, std::size_t>(),
             nb::arg("column"), nb::arg("floats").none(), nb::arg("halves").none(), nb::arg("bytes").none(), nb::arg("start"), nb::arg("order"),
             nb::arg("scale").none(), nb::arg("cols"))
        .def("linear", &SparseWeight::linear, nb::arg("x"), nb::arg("bias").none(), nb::arg("y").noconvert(), nb::arg("threads"),
             "Writes y = x W^T + bias.");
}
