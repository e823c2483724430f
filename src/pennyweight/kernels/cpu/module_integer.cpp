// The bindings of integer weights; see kernels/integer.py.

#include <cstdint>

#include "bindings.h"
#include "integer.h"

// An integer weight as Python holds it. Every size and index is checked when it is made, so that a damaged one ends in
// an error here and not in a read of foreign memory; what it refers to must not change afterwards.
class IntegerWeight {
public:
    IntegerWeight(Array<std::uint8_t, 1> codes, std::size_t rows, std::size_t cols, std::size_t bits, std::size_t group,
                  std::int32_t factor, std::int32_t zero, Array<float, 3> scale, Maybe<float, 3> minimum, Maybe<float, 1> column_scale,
                  Maybe<float, 1> column_offset, Maybe<std::int32_t, 1> escape_start, Maybe<std::int32_t, 2> escapes, double limit)
        : codes_(codes), scale_(scale), minimum_(minimum), column_scale_(column_scale), column_offset_(column_offset),
          escape_start_(escape_start), escapes_(escapes), limit_(limit) {
        constexpr std::size_t most = std::size_t(1) << 31;
        require(rows < most && cols < most && (bits == 8 || (bits >= 1 && bits <= 4)) && group % 8 == 0 && group > 0,
                "an integer weight has 1 to 4 or 8 bits and groups of a multiple of 8 columns");
        require(zero >= -(1 << 17) && zero <= 1 << 17 && factor >= 1 && factor <= 2, "factor or zero of an integer weight is out of range");
        w_ = {codes.data(), rows, cols, bits, group, factor, zero, scale.data(), data_or_null(minimum), data_or_null(column_scale), data_or_null(column_offset),
              nullptr, nullptr, nullptr, nullptr};
        require(codes.shape(0) == w_.blocks() * w_.block_bytes(), "the codes of an integer weight have the wrong size");
        const auto per_group = [&](const Array<float, 3> &a) {
            return a.shape(0) == w_.blocks() && a.shape(1) == w_.groups() && a.shape(2) == pennyweight::block_rows;
        };
        require(per_group(scale) && (!minimum || per_group(*minimum)), "the scales of an integer weight have the wrong size");
        require((!column_scale || column_scale->shape(0) == cols) && (!column_offset || column_offset->shape(0) == cols),
                "the column scales of an integer weight have the wrong size");
        if (!escape_start) return;
        require(bits == 8 && escapes && escapes->shape(0) == 3 && escape_start->shape(0) == w_.blocks() + 1,
                "the escapes of an integer weight have the wrong size");
        const std::size_t count = escapes->shape(1);
        const std::int32_t *start = escape_start->data(), *row = escapes->data(), *column = row + count;
        require(start[0] == 0 && static_cast<std::size_t>(start[w_.blocks()]) == count, "the escapes of an integer weight are out of order");
        for (std::size_t b = 0; b < w_.blocks(); ++b) require(start[b] <= start[b + 1], "the escapes of an integer weight are out of order");
        for (std::size_t e = 0; e < count; ++e)
            require(row[e] >= 0 && row[e] < std::int32_t(pennyweight::block_rows) && column[e] >= 0 && std::size_t(column[e]) < cols,
                    "an escape of an integer weight lies outside of it");
        w_.escape_start = start, w_.escape_row = row, w_.escape_column = column, w_.escape_extra = column + count;
    }

    // By addresses: finding out again what is known of a tensor would take longer than a small product.
    void linear(std::uintptr_t x, std::size_t n, std::uintptr_t bias, std::uintptr_t y, int activation_bits, unsigned threads) const {
        require(activation_bits == 8 || activation_bits == 16, "integer linear: activations have 8 or 16 bits");
        nb::gil_scoped_release release;
        pennyweight::integer_linear(w_, reinterpret_cast<const float *>(x), n, reinterpret_cast<const float *>(bias), reinterpret_cast<float *>(y),
                                    activation_bits, limit_, threads);
    }

    void decode(std::size_t first, std::size_t last, Output<float, 2> out, unsigned threads) const {
        require(first <= last && last <= w_.rows && out.shape(0) == last - first && out.shape(1) == w_.cols,
                "integer decode: shapes do not fit each other");
        nb::gil_scoped_release release;
        pennyweight::integer_decode(w_, first, last, out.data(), threads);
    }

private:
    Array<std::uint8_t, 1> codes_;
    Array<float, 3> scale_;
    Maybe<float, 3> minimum_;
    Maybe<float, 1> column_scale_, column_offset_;
    Maybe<std::int32_t, 1> escape_start_;
    Maybe<std::int32_t, 2> escapes_;
    double limit_;
    pennyweight::Integers w_{};
};

static void integer_arrange(Array<std::int16_t, 2> codes, std::size_t bits, Output<std::uint8_t, 1> out, unsigned threads) {
    require(bits == 8 || (bits >= 1 && bits <= 4), "an integer weight has 1 to 4 or 8 bits");
    pennyweight::Integers shape{};
    shape.rows = codes.shape(0), shape.cols = codes.shape(1), shape.bits = bits, shape.group = 8;
    require(out.shape(0) == shape.blocks() * shape.block_bytes(), "integer arrange: the output has the wrong size");
    nb::gil_scoped_release release;
    pennyweight::integer_arrange(codes.data(), shape, out.data(), threads);
}

template <typename T>
static void unpack_rows(Array<std::uint8_t, 2> packed, std::size_t bits, std::size_t cols, Array<std::int64_t, 1> index, Output<T, 2> out, unsigned threads) {
    const bool fits = bits >= 1 && bits <= 16 && (bits <= 8) == (sizeof(T) == 1) && packed.shape(1) == (cols * bits + 7) / 8 &&
                      out.shape(0) == index.shape(0) && out.shape(1) == cols;
    require(fits, "unpack rows: shapes do not fit each other");
    const std::int64_t *rows = index.data(), count = static_cast<std::int64_t>(packed.shape(0));
    for (std::size_t i = 0; i < index.shape(0); ++i)
        if (rows[i] < 0 || rows[i] >= count) throw nb::index_error("unpack rows: an index is out of range");
    nb::gil_scoped_release release;
    pennyweight::unpack_rows(packed.data(), packed.shape(1), bits, cols, rows, index.shape(0), out.data(), threads);
}

void bind_integer(nb::module_ &m) {
    nb::class_<IntegerWeight>(m, "IntegerWeight", "An integer weight in the kernels' arrangement; see kernels/integer.py.")
        .def(nb::init<Array<std::uint8_t, 1>, std::size_t, std::size_t, std::size_t, std::size_t, std::int32_t, std::int32_t, Array<float, 3>,
                      Maybe<float, 3>, Maybe<float, 1>, Maybe<float, 1>, Maybe<std::int32_t, 1>, Maybe<std::int32_t, 2>, double>(),
             nb::arg("codes"), nb::arg("rows"), nb::arg("cols"), nb::arg("bits"), nb::arg("group"), nb::arg("factor"), nb::arg("zero"),
             nb::arg("scale"), nb::arg("minimum").none(), nb::arg("column_scale").none(), nb::arg("column_offset").none(),
             nb::arg("escape_start").none(), nb::arg("escapes").none(), nb::arg("limit"))
        .def("linear", &IntegerWeight::linear, nb::arg("x"), nb::arg("n"), nb::arg("bias"), nb::arg("y"), nb::arg("activation_bits"), nb::arg("threads"),
             "Writes y [n, rows] = x [n, cols] W^T + bias [rows]: addresses of float32 in C order, 0 for no bias.")
        .def("decode", &IntegerWeight::decode, nb::arg("first"), nb::arg("last"), nb::arg("out").noconvert(), nb::arg("threads"),
             "Writes the decoded rows first .. last-1.");
    m.def("unpack_rows", &unpack_rows<std::uint8_t>, nb::arg("packed"), nb::arg("bits"), nb::arg("cols"), nb::arg("index"),
          nb::arg("out").noconvert(), nb::arg("threads"), "Writes the codes of some rows of a bit-packed matrix.");
    m.def("unpack_rows", &unpack_rows<std::int32_t>, nb::arg("packed"), nb::arg("bits"), nb::arg("cols"), nb::arg("index"),
          nb::arg("out").noconvert(), nb::arg("threads"));
    m.def("integer_arrange", &integer_arrange, nb::arg("codes"), nb::arg("bits"), nb::arg("out").noconvert(), nb::arg("threads"),
          "Arranges codes for IntegerWeight.");
}
