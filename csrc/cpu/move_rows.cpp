// Rows move inside one tensor without a buffer: entries that rise, no row moving up, can be done one after the other, for what an
// entry overwrites was read before; entries that fall are the mirror image. Neighbours that stay neighbours are one memmove.
//
// A task is a stretch of entries behind which nothing is written that it reads: compacting runs that keep their starts gives one or
// more per run, closing gaps between the runs often only one.
#include <algorithm>
#include <cstring>
#include <vector>

#include "../checks.h"
#include "../ops.h"

namespace SA_NAMESPACE {
namespace {

constexpr int64_t kTaskBytes = 1 << 16;  // of the entries of a task, at least

// 1 where entries rise, -1 where they fall; refuses everything else
int64_t direction(const MoveRows& a) {
  const int64_t *from = a.sources, *to = a.targets;
  bool inside = true, rises = true, falls = true;
  for (int64_t i = 0; i < a.n; ++i) {
    inside &= (from[i] >= 0) & (from[i] < a.n_rows) & (to[i] >= 0) & (to[i] < a.n_rows);
    rises &= to[i] <= from[i], falls &= to[i] >= from[i];
  }
  for (int64_t i = 1; i < a.n; ++i) {
    rises &= (from[i] > from[i - 1]) & (to[i] > to[i - 1]);
    falls &= (from[i] < from[i - 1]) & (to[i] < to[i - 1]);
  }
  SA_CHECK(inside, "an entry names a row that does not exist; there are ", a.n_rows);
  SA_CHECK(rises || falls, "sources and targets must rise with no target past its source, or fall with no target before it");
  return rises ? 1 : -1;
}

// entries [first, last) in order
void move(const MoveRows& a, int64_t step, int64_t first, int64_t last) {
  if (a.row_bytes == 4) {  // positions and scores: looking for neighbours took twice as long as copying
    for (int64_t i = first; i < last; ++i) std::memcpy(a.rows + a.targets[i] * 4, a.rows + a.sources[i] * 4, 4);
    return;
  }
  const auto follows = [&](int64_t i) { return a.sources[i] - a.sources[i - 1] == step && a.targets[i] - a.targets[i - 1] == step; };
  for (int64_t i = first, end; i < last; i = end) {
    for (end = i + 1; end < last && follows(end);) ++end;
    const int64_t low = step > 0 ? i : end - 1;
    if (a.sources[low] == a.targets[low]) continue;
    std::memmove(a.rows + a.targets[low] * a.row_bytes, a.rows + a.sources[low] * a.row_bytes, (end - i) * a.row_bytes);
  }
}

}  // namespace

void move_rows(const MoveRows& args, const Parallel& parallel) {
  const int64_t step = direction(args);
  const int64_t at_least = std::max<int64_t>(1, kTaskBytes / std::max<int64_t>(1, args.row_bytes));
  std::vector<int64_t> cuts{0};
  for (int64_t i = at_least; i < args.n;) {
    // later targets lie further on still, and later sources were never targets before
    const bool apart = (args.targets[i] - args.sources[i - 1]) * step > 0;
    if (apart) cuts.push_back(i);
    i += apart ? at_least : 1;
  }
  cuts.push_back(args.n);
  parallel_tasks(parallel, int64_t(cuts.size()) - 1, [&](TaskQueue& queue) {
    for (int64_t task; queue.take(&task);) move(args, step, cuts[task], cuts[task + 1]);
  });
}

}  // namespace SA_NAMESPACE
