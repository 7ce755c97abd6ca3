// Rows move through a buffer, some megabytes at a time: entries are gathered into it and scattered from it by kernels that follow
// each other on the stream. Entries of one sweep never overtake each other that way, and a later sweep reads nothing that an
// earlier one wrote: sources that rise lie behind every target before them, those that fall before it.
// Python allocates the buffer small enough for the L2 cache, so device memory sees each row read once and written once.
// An entry that names no row is left out.
#include "simt.h"

namespace SA_NAMESPACE {
namespace {

constexpr int kThreads = 256;
constexpr int kUnits = 4;  // loads of a thread that are under way together

// units of entries [first, first + entries) between the rows and the buffer
template <class Unit, bool gather>
SA_GLOBAL(kThreads) void copy_rows(const MoveRows a, Unit* buffer, int64_t first, uint32_t entries, uint32_t per_row) {
  const uint32_t units = entries * per_row, step = uint32_t(grid_x()) * kThreads;
  Unit moved[kUnits];
  int64_t at[kUnits];
  for (int i = 0; i < kUnits; ++i) {
    const uint32_t unit = uint32_t(block_x()) * kThreads + thread() + i * step;
    at[i] = -1;
    if (unit >= units) continue;
    const int64_t entry = first + unit / per_row, source = a.sources[entry], target = a.targets[entry];
    if (source < 0 || source >= a.n_rows || target < 0 || target >= a.n_rows) continue;
    const int64_t in_rows = (gather ? source : target) * per_row + unit % per_row;
    at[i] = gather ? unit : in_rows;
    moved[i] = gather ? reinterpret_cast<const Unit*>(a.rows)[in_rows] : buffer[unit];
  }
  for (int i = 0; i < kUnits; ++i)
    if (at[i] >= 0) (gather ? buffer : reinterpret_cast<Unit*>(a.rows))[at[i]] = moved[i];
}

template <class Unit>
void sweep(const MoveRows& a, const Stream& stream) {
  Unit* buffer = static_cast<Unit*>(stream.work[0].data);
  const int64_t at_once = stream.work[0].size[3] / a.row_bytes, per_row = a.row_bytes / int64_t(sizeof(Unit));
  SA_CHECK(at_once > 0 && at_once * per_row < int64_t(1) << 31, "CUDA: a buffer of ", stream.work[0].size[3], " bytes for rows of ",
           a.row_bytes, " bytes");
  for (int64_t first = 0; first < a.n; first += at_once) {
    const int64_t entries = std::min(at_once, a.n - first);
    const Grid grid{(entries * per_row + kThreads * kUnits - 1) / (kThreads * kUnits)};
    launch<copy_rows<Unit, true>>(grid, kThreads, 0, stream, a, buffer, first, uint32_t(entries), uint32_t(per_row));
    launch<copy_rows<Unit, false>>(grid, kThreads, 0, stream, a, buffer, first, uint32_t(entries), uint32_t(per_row));
  }
}

}  // namespace

void move_rows(const MoveRows& args, const Stream& stream) {
  if (args.n == 0 || args.row_bytes == 0) return;
  const int64_t odd = args.row_bytes | int64_t(reinterpret_cast<uintptr_t>(args.rows));
  if (odd % 16 == 0) sweep<Vec16>(args, stream);
  else if (odd % 4 == 0) sweep<uint32_t>(args, stream);
  else sweep<uint8_t>(args, stream);
}

}  // namespace SA_NAMESPACE
