// The ops that the CUDA library serves, and those of its emulated twin.
// Nothing of CUDA torch is linked: the library loads beside any torch of 2.11 or newer and says what is missing there.
#define SA_FIRST_ARGUMENTS "Tensor(z!)[] work, "
#include <vector>

#include "../bindings.h"
#include "device.h"

#if !defined(SA_CUDA_EMULATED)
#include <dlfcn.h>
#endif

namespace SA_NAMESPACE {
namespace {

#if defined(SA_CUDA_EMULATED)

void* stream_of(int) { return nullptr; }

#else

using CurrentStream = int32_t (*)(int32_t device, void** stream);  // of torch's C shim

CurrentStream current_stream() {
  static const CurrentStream found = [] {
    void* torch = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return reinterpret_cast<CurrentStream>(dlsym(torch ? torch : RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream"));
  }();
  return found;
}

void* stream_of(int device) {
  void* stream = nullptr;
  SA_CHECK(current_stream() && current_stream()(device, &stream) == 0, "CUDA: torch gave no stream for device ", device);
  return stream;
}

#endif

// empty, or what is missing on this machine
std::string missing(int64_t device) {
#if !defined(SA_CUDA_EMULATED)
  if (!current_stream()) return "this torch was built without CUDA";
#endif
  return missing_of_device(static_cast<int>(device));
}

// the kernels follow what is on the current stream of the first tensor's device
Stream stream_for(const std::vector<Tensor>& work, const Tensor& first) {
  const int device = static_cast<int>(first.get_device_index());
  Stream stream{device, stream_of(device), {}};
  SA_CHECK(work.size() <= std::size(stream.work), "CUDA: ", work.size(), " workspaces");
  for (size_t i = 0; i < work.size(); ++i) {
    const Tensor& t = work[i];
    SA_CHECK(t.is_contiguous() && t.dim() <= 4, "CUDA: workspace ", i, " is not contiguous");
    stream.work[i] = {t.data_ptr(), {1, 1, 1, 1}};
    for (int64_t d = 0; d < t.dim(); ++d) stream.work[i].size[4 - t.dim() + d] = t.size(d);
  }
  return stream;
}

template <auto run>
struct On;
template <class... Args, void (*run)(const Where&, Tensor, Args...)>
struct On<run> {
  static void call(std::vector<Tensor> work, Tensor first, Args... args) { run(stream_for(work, first), first, args...); }
};

}  // namespace

#define SA_SERVE(op)   \
  m.def(kSchema_##op); \
  m.impl(#op, TORCH_BOX(&On<&run_##op>::call))

STABLE_TORCH_LIBRARY(SA_LIBRARY, m) {
  m.def("missing(int device) -> str");
  m.impl("missing", TORCH_BOX(&missing));
  // one line per op, from here on
  SA_SERVE(gather_pages);
  SA_SERVE(keep_top);
  SA_SERVE(lowrank_keys);
  SA_SERVE(move_rows);
  SA_SERVE(paged_attention);
  SA_SERVE(place_pages);
  SA_SERVE(select_blocks);
  SA_SERVE(select_global);
}

}  // namespace SA_NAMESPACE
