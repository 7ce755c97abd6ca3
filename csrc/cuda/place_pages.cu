// Which slot each wanted page is in or comes to: a block per run, everything in shared memory, no sort.
//
// The wanted pages go into a hash table, as the place where each is first named; every slot looks its page up there. Slots stand in the
// order in which they were last wanted, so that those to take, those that stay and those that go to the end are found by counting.
// Never run on a GPU.
#include "simt.h"

namespace SA_NAMESPACE {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

// Entries of the table: a power of two, half of them empty at the least.
SA_HOST_DEVICE inline int table_size(int m) {
  int size = 32;
  while (size < 2 * m) size *= 2;
  return size;
}

// What a block has in shared memory.
struct Shared {
  int *sums, *table, *wanted, *at, *victims, *queue;
  SA_HOST_DEVICE static int64_t bytes(int m, int slots) { return int64_t(sizeof(int)) * (kWarps + table_size(m) + 3 * m + slots); }
  SA_DEVICE Shared(char* base, int m) {
    sums = reinterpret_cast<int*>(base);
    table = sums + kWarps;
    wanted = table + table_size(m);
    at = wanted + m;
    victims = at + m;
    queue = victims + m;
  }
};

SA_DEVICE int bucket(int id, int size) { return int(uint32_t(id) * 2654435769u >> 7) & (size - 1); }

// Where a page is first named, -1 for nowhere.
SA_DEVICE int named_at(const Shared& s, int id, int size) {
  for (int b = bucket(id, size);; b = (b + 1) & (size - 1)) {
    const int i = s.table[b];
    if (i < 0 || s.wanted[i] == id) return i;
  }
}

// The sum over the threads below, and of all in ``total``; every thread of the block comes here.
SA_DEVICE int sum_below(const Shared& s, int x, int* total) {
  int upto = x;
  for (int n = 1; n < 32; n *= 2) {
    const int below = shuffle_up(upto, n);
    if (lane() >= n) upto += below;
  }
  if (lane() == 31) s.sums[warp()] = upto;
  barrier();
  int base = 0;
  *total = 0;
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp()) base += s.sums[w];
    *total += s.sums[w];
  }
  barrier();
  return base + upto - x;
}

SA_GLOBAL(kThreads) void place(const PlacePages a) {
  const int m = a.m, slots = a.slots, size = table_size(m);
  const Shared s(shared_memory(), m);
  const int64_t run = block_x();
  int32_t *held = a.held + run * slots, *order = a.order + run * slots, *out = a.out + run * m;
  uint8_t* misses = a.misses + run * m;

  for (int b = thread(); b < size; b += kThreads) s.table[b] = -1;
  for (int i = thread(); i < m; i += kThreads) s.wanted[i] = a.ids[run * m + i], s.at[i] = -1;
  barrier();
  for (int i = thread(); i < m; i += kThreads) {
    const int id = s.wanted[i];
    for (int b = bucket(id, size); id >= 0; b = (b + 1) & (size - 1)) {
      const int there = atomic_compare_swap(&s.table[b], -1, i);
      if (there >= 0 && s.wanted[there] != id) continue;
      if (there >= 0) atomic_min(&s.table[b], i);
      break;
    }
  }
  barrier();
  for (int slot = thread(); slot < slots; slot += kThreads) {
    const int i = held[slot] < 0 ? -1 : named_at(s, held[slot], size);
    if (i >= 0) s.at[i] = slot;
  }
  barrier();

  int n_new = 0, total;
  for (int base = 0; base < m; base += kThreads) {
    const int i = base + thread(), id = i < m ? s.wanted[i] : -1;
    sum_below(s, id >= 0 && s.at[i] < 0 && named_at(s, id, size) == i, &total);
    n_new += total;
  }
  // slots that nobody wants, the longest not wanted first: the first go to the new pages, the others keep their order
  int idle = 0;
  for (int base = 0; base < slots; base += kThreads) {
    const int j = base + thread(), slot = j < slots ? order[j] : 0;
    const bool free = j < slots && (held[slot] < 0 || named_at(s, held[slot], size) < 0);
    const int place = idle + sum_below(s, free, &total);
    if (free) (place < n_new ? s.victims[place] : s.queue[place - n_new]) = slot;
    idle += total;
  }
  barrier();
  // behind them those that were wanted now, as they were named
  int named = idle - n_new, fresh = 0;
  for (int base = 0; base < m; base += kThreads) {
    const int i = base + thread(), id = i < m ? s.wanted[i] : -1;
    const bool first = id >= 0 && named_at(s, id, size) == i, missed = first && s.at[i] < 0;
    const int below = sum_below(s, int(first) << 16 | int(missed), &total);  // m < 2^15: both sums at once
    if (missed) {
      s.at[i] = s.victims[fresh + (below & 0xffff)];
      held[s.at[i]] = id;
    }
    if (first) s.queue[named + (below >> 16)] = s.at[i];
    if (i < m) misses[i] = missed;
    named += total >> 16;
    fresh += total & 0xffff;
  }
  barrier();
  for (int i = thread(); i < m; i += kThreads) out[i] = s.wanted[i] < 0 ? -1 : s.at[named_at(s, s.wanted[i], size)];
  for (int j = thread(); j < slots; j += kThreads) order[j] = s.queue[j];
}

}  // namespace

void place_pages(const PlacePages& args, const Stream& stream) {
  launch<place>(Grid{args.runs}, kThreads, Shared::bytes(args.m, args.slots), stream, args);
}

}  // namespace SA_NAMESPACE
