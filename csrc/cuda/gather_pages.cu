// Pages from page-locked memory of the host, or from the device's, to rows on the device: the kernel reads across the bus itself.
//
// A warp moves a piece of a page, 16 bytes per lane and load, all its loads before its first store. What a bus needs is bytes on their
// way: its bandwidth times its latency, 0.1 MB for PCIe 5 (55 GB/s, 2 us) and 0.5 MB for NVLink-C2C. kBlocks blocks keep 2 MB asked
// for, and leave threads of every multiprocessor to what runs beside. Counted, not measured: it has never run on a GPU.
// An entry that names no page or no row is left out.
#include "simt.h"

namespace SA_NAMESPACE {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32, kLoads = 4;
constexpr int64_t kBlocks = 128;

template <class Word>
constexpr int64_t kPieceWords = 32 * kLoads;

template <class Word>
SA_GLOBAL(kThreads) void copy_pages(const GatherPages a, const int64_t pieces) {
  const int64_t words = a.page_bytes / int64_t(sizeof(Word)), warps = int64_t(grid_x()) * kWarps;
  for (int64_t task = int64_t(block_x()) * kWarps + warp(); task < a.n * pieces; task += warps) {
    const int64_t i = task / pieces, source = a.sources[i];
    if (source < 0 || source >= a.n_pages || a.targets[i] < 0 || a.targets[i] >= a.n_rows) continue;
    const Word* from = reinterpret_cast<const Word*>(a.pages + source * a.page_bytes);
    Word* to = reinterpret_cast<Word*>(a.rows + a.targets[i] * a.page_bytes);
    const int64_t first = (task - i * pieces) * kPieceWords<Word> + lane();
    Word held[kLoads] = {};
#pragma unroll
    for (int l = 0; l < kLoads; ++l) {
      if (first + 32 * l < words) held[l] = from[first + 32 * l];
    }
#pragma unroll
    for (int l = 0; l < kLoads; ++l) {
      if (first + 32 * l < words) to[first + 32 * l] = held[l];
    }
  }
}

template <class Word>
void launch_copy(const GatherPages& a, const Stream& stream) {
  const int64_t words = a.page_bytes / int64_t(sizeof(Word)), pieces = (words + kPieceWords<Word> - 1) / kPieceWords<Word>;
  const int64_t blocks = std::min((a.n * pieces + kWarps - 1) / kWarps, kBlocks);
  if (blocks > 0) launch<copy_pages<Word>>(Grid{blocks}, kThreads, 0, stream, a, pieces);
}

}  // namespace

void gather_pages(const GatherPages& args, const Stream& stream) {
  GatherPages a = args;
#if !defined(SA_CUDA_EMULATED)
  // allowed while a graph is captured: it asks about an address, no stream
  cudaPointerAttributes of{};
  const bool known = cudaPointerGetAttributes(&of, a.pages) == cudaSuccess && of.type != cudaMemoryTypeUnregistered;
  if (!known) cudaGetLastError();
  SA_CHECK(known || a.n_pages == 0, "pages are in host memory that is not page-locked; call pin_memory(), or move them to the device");
  a.pages = static_cast<const char*>(of.devicePointer);
#endif
  const int64_t odd = a.page_bytes | int64_t(reinterpret_cast<uintptr_t>(a.pages) | reinterpret_cast<uintptr_t>(a.rows));
  odd % 16 == 0 ? launch_copy<Vec16>(a, stream) : launch_copy<uint8_t>(a, stream);
}

}  // namespace SA_NAMESPACE
