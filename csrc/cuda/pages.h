// Lists of pages on the device: how many tokens a list names, and which of them stands where.
//
// A page that lies outside its store counts as empty, so that nothing is read or written for it.
#pragma once
#include "../ops.h"
#include "simt.h"

namespace SA_NAMESPACE {

// The pages of every sequence and key head, [lists, pages].
struct PageTable {
  const int64_t *starts, *targets;  // targets may be null
  const int32_t* counts;
  int64_t lists, pages;
  int64_t stored, room;  // rows of what starts and targets point into
  int64_t* ends;         // [lists, pages], written by list_pages where there are several: tokens up to and including each page

  SA_HOST_DEVICE int64_t tokens(int64_t list, int64_t page) const {
    const int64_t at = list * pages + page, start = starts[at], count = counts[at], target = targets ? targets[at] : 0;
    const bool inside = count > 0 && start >= 0 && start <= stored - count && (!targets || (target >= 0 && target <= room - count));
    return inside ? count : 0;
  }
  SA_HOST_DEVICE int64_t length(int64_t list) const {
    return pages > 1 ? ends[(list + 1) * pages - 1] : pages ? tokens(list, 0) : 0;
  }

  struct Place {
    int64_t source, target;
  };
  // of the token at `position` of a list, which is below its length
  SA_HOST_DEVICE Place place(int64_t list, int64_t position) const {
    const int64_t* const mine = ends + list * pages;
    int64_t page = 0;
    for (int64_t above = pages - 1; page < above;) {
      const int64_t middle = (page + above) / 2;
      if (mine[middle] <= position) page = middle + 1;
      else above = middle;
    }
    const int64_t at = list * pages + page, offset = position - (page ? mine[page - 1] : 0);
    return {starts[at] + offset, targets ? targets[at] + offset : 0};
  }
};

constexpr int kListThreads = 512;

// A block per list: every thread sums a slice of its pages, the sums are scanned, and the slices are summed again from there.
template <int kThreads>
SA_GLOBAL(kThreads) void list_pages(const PageTable table) {
  int64_t* const sums = reinterpret_cast<int64_t*>(shared_memory());  // [warps]
  const int64_t list = block_x(), slice = (table.pages + kThreads - 1) / kThreads;
  const int64_t first = thread() * slice, last = first + slice < table.pages ? first + slice : table.pages;
  int64_t sum = 0;
  for (int64_t page = first; page < last; ++page) sum += table.tokens(list, page);
  int64_t before = sum;
  for (int step = 1; step < 32; step *= 2) {
    const int64_t other = shuffle_up(before, step);
    if (lane() >= step) before += other;
  }
  if (lane() == 31) sums[warp()] = before;
  barrier();
  before -= sum;
  for (int w = 0; w < warp(); ++w) before += sums[w];
  for (int64_t page = first; page < last; ++page) table.ends[list * table.pages + page] = before += table.tokens(list, page);
}

// fills table.ends
inline void launch_list_pages(const PageTable& table, const Stream& stream) {
  if (table.lists && table.pages > 1)
    launch<list_pages<kListThreads>>({table.lists}, kListThreads, kListThreads / 32 * sizeof(int64_t), stream, table);
}

}  // namespace SA_NAMESPACE
