// The bindings of the steps of optimizers; see kernels/optimizer.py.

#include <nanobind/stl/vector.h>

#include <cstddef>
#include <vector>

#include "bindings.h"
#include "optimizer.h"

using pennyweight::Decay;

// Tensors of any shape, in C order.
using Read = nb::ndarray<const float, nb::c_contig, nb::device::cpu>;
using Written = nb::ndarray<float, nb::c_contig, nb::device::cpu>;

// The data of a weight's tensor in a list that has one for each weight, or null if the list is empty.
template <typename A>
static auto data_of(const std::vector<A> &list, std::size_t index, std::size_t count) -> decltype(list[0].data()) {
    if (list.empty()) return nullptr;
    require(index < list.size() && list[index].size() == count, "step of an optimizer: the tensors do not fit the weights");
    return list[index].data();
}

static void adam_step(const std::vector<Written> &weights, const std::vector<Read> &gradients, const std::vector<Written> &means,
                      const std::vector<Written> &squares, const std::vector<Written> &largest, const std::vector<double> &steps, double rate,
                      double beta1, double beta2, double eps, bool maximize, const Decay &decay, unsigned threads) {
    require(!gradients.empty() && !means.empty() && !squares.empty() && steps.size() == weights.size(), "step of Adam: a list does not fit the weights");
    std::vector<pennyweight::AdamWeight> all;
    for (std::size_t i = 0; i < weights.size(); ++i) {
        const std::size_t n = weights[i].size();
        all.push_back({weights[i].data(), data_of(gradients, i, n), data_of(means, i, n), data_of(squares, i, n), data_of(largest, i, n), n, steps[i]});
    }
    nb::gil_scoped_release release;
    pennyweight::adam(all, {rate, beta1, beta2, eps, maximize}, decay, threads);
}

static void sgd_step(const std::vector<Written> &weights, const std::vector<Read> &gradients, const std::vector<Written> &momenta, double rate,
                     double momentum, double dampening, bool nesterov, bool maximize, const Decay &decay, unsigned threads) {
    require(!gradients.empty() && momenta.empty() == (momentum == 0.0), "step of SGD: a list does not fit the weights");
    std::vector<pennyweight::SgdWeight> all;
    for (std::size_t i = 0; i < weights.size(); ++i) {
        const std::size_t n = weights[i].size();
        all.push_back({weights[i].data(), data_of(gradients, i, n), data_of(momenta, i, n), n});
    }
    nb::gil_scoped_release release;
    pennyweight::sgd(all, {rate, momentum, dampening, nesterov, maximize}, decay, threads);
}

static void decay_divisors(Read weight, Written divisors, const Decay &decay, unsigned threads) {
    require(weight.size() == divisors.size(), "divisors of a decay: there must be one for each weight");
    nb::gil_scoped_release release;
    pennyweight::decay_divisors(decay, weight.data(), divisors.data(), weight.size(), threads);
}

static void divide(Written weight, Read divisors, double zero_below, unsigned threads) {
    require(weight.size() == divisors.size(), "divisors of a decay: there must be one for each weight");
    nb::gil_scoped_release release;
    pennyweight::divide(static_cast<float>(zero_below), weight.data(), divisors.data(), weight.size(), threads);
}

void bind_optimizer(nb::module_ &m) {
    nb::class_<Decay>(m, "Decay", "Weight decay for a p norm, 0 < p <= 4.")
        .def("__init__",
             [](Decay *self, double p, double strength, double zero_below) {
                 require(p > 0.0 && p <= 4.0 && strength >= 0.0, "decay: p must be above 0 and at most 4, and strength not negative");
                 new (self) Decay(pennyweight::decay(p, strength, zero_below));
             },
             nb::arg("p"), nb::arg("strength"), nb::arg("zero_below"));
    m.def("adam_step", &adam_step, nb::arg("weights").noconvert(), nb::arg("gradients").noconvert(), nb::arg("means").noconvert(),
          nb::arg("squares").noconvert(), nb::arg("largest").noconvert(), nb::arg("steps"), nb::arg("rate"), nb::arg("beta1"), nb::arg("beta2"),
          nb::arg("eps"), nb::arg("maximize"), nb::arg("decay"), nb::arg("threads"), "A step of Adam and the decay, in place.");
    m.def("sgd_step", &sgd_step, nb::arg("weights").noconvert(), nb::arg("gradients").noconvert(), nb::arg("momenta").noconvert(), nb::arg("rate"),
          nb::arg("momentum"), nb::arg("dampening"), nb::arg("nesterov"), nb::arg("maximize"), nb::arg("decay"), nb::arg("threads"),
          "A step of SGD and the decay, in place.");
    m.def("decay_divisors", &decay_divisors, nb::arg("weight").noconvert(), nb::arg("divisors").noconvert(), nb::arg("decay"), nb::arg("threads"),
          "Writes what the decay will divide each number by.");
    m.def("divide", &divide, nb::arg("weight").noconvert(), nb::arg("divisors").noconvert(), nb::arg("zero_below"), nb::arg("threads"),
          "weight /= divisors in place; what is at most zero_below then is zero.");
}
