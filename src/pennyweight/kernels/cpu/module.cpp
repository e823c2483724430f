// pennyweight.kernels._cpu: compiled twins of reference code. Tensors cross as DLPack arrays; no PyTorch ABI.

#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <vector>

#include "bindings.h"
#include "feedback.h"
#include "isa.h"

using Vector = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Strided = nb::ndarray<const float, nb::ndim<2>, nb::device::cpu>;
using Errors = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Codes = nb::ndarray<std::int16_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

static void feedback_block(Strided work, Strided upper, Vector row, Vector column, Codes codes, Errors errors, unsigned threads) {
    const std::size_t rows = work.shape(0), width = work.shape(1);
    const bool fits = width <= pennyweight::max_width && upper.shape(0) == width && upper.shape(1) == width &&
                      row.shape(0) == rows && column.shape(0) == width && codes.shape(0) == rows &&
                      codes.shape(1) == width && errors.shape(0) == rows && errors.shape(1) == width &&
                      (width < 2 || (work.stride(1) == 1 && upper.stride(1) == 1));
    if (!fits) throw nb::value_error("feedback_block: shapes or strides do not fit each other");
    const pennyweight::Block block{work.data(),
                                   static_cast<std::size_t>(work.stride(0)),
                                   upper.data(),
                                   static_cast<std::size_t>(upper.stride(0)),
                                   row.data(),
                                   column.data(),
                                   codes.data(),
                                   errors.data(),
                                   rows,
                                   width};
    nb::gil_scoped_release release;
    pennyweight::feedback_block(block, threads);
}

void bind_binary(nb::module_ &m);
void bind_integer(nb::module_ &m);
void bind_optimizer(nb::module_ &m);
void bind_sparse(nb::module_ &m);

NB_MODULE(_cpu, m) {
    m.def("feedback_block", &feedback_block, nb::arg("work"), nb::arg("upper"), nb::arg("row"), nb::arg("column"),
          nb::arg("codes").noconvert(), nb::arg("errors").noconvert(), nb::arg("threads"),
          "One block of columns of error feedback on a uniform grid; writes codes and errors.");
    m.def("instruction_sets", [] {
        std::vector<std::string> names;
        for (const pennyweight::Isa isa : pennyweight::available()) names.emplace_back(pennyweight::name(isa));
        return names;
    }, "Those compiled in that this processor has, worst first.");
    m.def("use", [](const std::string &name) { pennyweight::use(pennyweight::named(name)); }, nb::arg("name"),
          "Have the kernels use this instruction set from now on.");
    bind_integer(m);
    bind_binary(m);
    bind_sparse(m);
    bind_optimizer(m);
}
