// kvcache.tiers._host: numpy arrays -> pools. The only file that knows Python; plain.py is its twin.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <memory>
#include <string>

#include "pools.h"
#include "slots.h"

namespace py = pybind11;
using namespace sparse_attn_host;

namespace {

using Bytes = py::array_t<uint8_t, py::array::c_style>;
using Numbers = py::array_t<int64_t, py::array::c_style>;

// The end of a read; keeps what is read into alive.
class Fence {
 public:
  Fence(std::shared_ptr<Engine> engine, std::shared_ptr<Job> job, Bytes out)
      : engine_(std::move(engine)), job_(std::move(job)), out_(std::move(out)) {}
  ~Fence() {
    try {
      wait();
    } catch (const Failure&) {
      // nobody asked
    }
  }
  void wait() {
    py::gil_scoped_release free;
    engine_->wait(*job_);
  }
  bool done() { return engine_->done(*job_); }

 private:
  std::shared_ptr<Engine> engine_;
  std::shared_ptr<Job> job_;
  Bytes out_;
};

py::dict of(const Counts& counts) {
  py::dict made;
  made["pages"] = counts.pages;
  made["bytes"] = counts.bytes;
  made["peak_bytes"] = counts.peak_bytes;
  made["read_bytes"] = counts.read_bytes;
  return made;
}

py::dict counts(Engine& engine) {
  auto state = engine.counts();
  py::dict made;
  made["host"] = of(state.host);
  made["disk"] = of(state.disk);
  made["moved"] = state.moved;
  return made;
}

Numbers write_pages(Pool& pool, const Bytes& pages) {
  Numbers ids(pages.shape(0));
  const uint8_t* from = pages.data();
  int64_t n = pages.shape(0), *to = ids.mutable_data();
  py::gil_scoped_release free;
  pool.write(from, n, to);
  return ids;
}

std::unique_ptr<Fence> read_pages(Pool& pool, const Numbers& ids, Bytes out, const Numbers& slots) {
  uint8_t* to = out.mutable_data();
  auto job = [&] {
    py::gil_scoped_release free;
    return pool.read(ids.data(), slots.data(), ids.size(), to, out.shape(0));
  }();
  return std::make_unique<Fence>(pool.engine(), std::move(job), std::move(out));
}

py::object array_of(const std::shared_ptr<Pool>& pool) {
  auto [base, rows] = pool->array();
  if (!base) return py::none();
  return Bytes({rows, pool->page_bytes()}, base, py::cast(pool));
}

Numbers rows_of(Pool& pool, const Numbers& ids) {
  Numbers rows(ids.size());
  pool.rows(ids.data(), ids.size(), rows.mutable_data());
  return rows;
}

py::tuple want(Slots& slots, const Numbers& ids) {
  const int64_t runs = ids.shape(0), m = ids.shape(1);
  Numbers slot({runs, m});
  py::array_t<bool, py::array::c_style> miss({runs, m});
  slots.want(ids.data(), m, slot.mutable_data(), miss.mutable_data());
  return py::make_tuple(std::move(slot), std::move(miss));
}

void raise(const Failure& failure) {
  py::list arguments;
  for (const auto& argument : failure.arguments) std::visit([&](const auto& value) { arguments.append(value); }, argument);
  py::object made = py::module_::import("kvcache.tiers.errors").attr(failure.name.c_str())(*arguments);
  PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(made.ptr())), made.ptr());
}

}  // namespace

PYBIND11_MODULE(_host, m) {
  py::register_exception_translator([](std::exception_ptr thrown) {
    try {
      if (thrown) std::rethrow_exception(thrown);
    } catch (const Failure& failure) {
      raise(failure);
    }
  });
  using Free = py::call_guard<py::gil_scoped_release>;
  py::class_<Engine, std::shared_ptr<Engine>>(m, "Engine")
      .def(py::init([](int64_t host, int64_t disk, const std::string& folder, int threads) {
        // in a child process what waits for the threads would wait for ever
        return std::shared_ptr<Engine>(new Engine(host, disk, folder, threads), [](Engine* engine) {
          if (engine->own()) delete engine;
        });
      }))
      .def("counts", &counts);
  py::class_<Pool, std::shared_ptr<Pool>>(m, "Pool")
      .def(py::init<std::shared_ptr<Engine>, int64_t>())
      .def(py::init([](std::shared_ptr<Engine> engine, int64_t page_bytes, uintptr_t lock, uintptr_t unlock) {
        const Locks locks{reinterpret_cast<decltype(Locks::lock)>(lock), reinterpret_cast<decltype(Locks::unlock)>(unlock)};
        return std::make_shared<Pool>(std::move(engine), page_bytes, locks);
      }))
      .def("array", &array_of)
      .def("refusal", &Pool::refusal)
      .def("rows", &rows_of, py::arg("ids").noconvert())
      .def("write", &write_pages, py::arg("pages").noconvert())
      .def("read", &read_pages, py::arg("ids").noconvert(), py::arg("out").noconvert(), py::arg("slots").noconvert())
      .def("hold", [](Pool& pool, const Numbers& ids) { pool.hold(ids.data(), ids.size()); }, py::arg("ids").noconvert())
      .def("release", [](Pool& pool, const Numbers& ids) { pool.release(ids.data(), ids.size()); }, py::arg("ids").noconvert())
      .def("close", &Pool::close, Free());
  py::class_<Fence>(m, "Fence").def("wait", &Fence::wait).def("done", &Fence::done);
  py::class_<Slots>(m, "Slots")
      .def(py::init<int64_t, int64_t>())
      .def("want", &want, py::arg("ids").noconvert())
      .def("clear", &Slots::clear)
      .def_readonly("hits", &Slots::hits)
      .def_readonly("misses", &Slots::misses);
}
