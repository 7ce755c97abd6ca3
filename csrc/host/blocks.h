// Blocks of one size in slabs of anonymous memory: growing copies nothing, and an empty slab goes back to the system. In an arena
// they are rows of one array; its first slab stays, because a driver is asked about all of it by its first address.
#pragma once
#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <memory>
#include <numeric>
#include <set>
#include <vector>

#include "arena.h"

namespace sparse_attn_host {

class Blocks {
 public:
  explicit Blocks(int64_t block) : block_(block), per_slab_(std::max<int64_t>(kSlab / block, 1)) {}
  // In an arena, for ``most`` bytes of blocks.
  Blocks(int64_t block, int64_t most, Locks locks) : block_(block), per_slab_(whole(block)) {
    arena_ = std::make_unique<Arena>(most / slab_bytes() + 2, slab_bytes(), locks);
    if (!arena_->base()) arena_ = nullptr;
  }
  Blocks(const Blocks&) = delete;
  ~Blocks() {
    for (auto& [base, slab] : slabs_) {
      if (!arena_) munmap(base, slab_bytes());
    }
  }

  // Null without one.
  const Arena* arena() const { return arena_.get(); }

  // Null when the system has no memory.
  uint8_t* take() {
    if (open_.empty()) {
      uint8_t* base = grow();
      if (!base) return nullptr;
      slabs_.emplace(base, Slab{});
      open_.insert(base);
    }
    uint8_t* base = *open_.begin();
    Slab& slab = slabs_[base];
    int64_t number = slab.touched;
    if (slab.free.empty()) {
      ++slab.touched;
    } else {
      number = slab.free.back();
      slab.free.pop_back();
    }
    if (++slab.used == per_slab_) open_.erase(base);
    return base + number * block_;
  }

  void give(uint8_t* block) {
    auto found = std::prev(slabs_.upper_bound(block));
    auto& [base, slab] = *found;
    if (--slab.used == 0 && !(arena_ && base == arena_->base())) {
      open_.erase(base);
      arena_ ? arena_->give(base) : void(munmap(base, slab_bytes()));
      slabs_.erase(found);
      return;
    }
    slab.free.push_back((block - base) / block_);
    open_.insert(base);
  }

 private:
  struct Slab {
    int64_t used = 0, touched = 0;
    std::vector<int64_t> free;
  };
  static constexpr int64_t kSlab = 4 << 20, kSystemPage = 4096;

  // Blocks of a slab that is whole pages of the system.
  static int64_t whole(int64_t block) {
    const int64_t step = kSystemPage / std::gcd(block, kSystemPage);
    return std::max<int64_t>(kSlab / block / step, 1) * step;
  }

  int64_t slab_bytes() const { return per_slab_ * block_; }

  uint8_t* grow() {
    if (arena_) return arena_->take();
    void* base = mmap(nullptr, slab_bytes(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return base == MAP_FAILED ? nullptr : static_cast<uint8_t*>(base);
  }

  const int64_t block_, per_slab_;
  std::unique_ptr<Arena> arena_;
  std::map<uint8_t*, Slab> slabs_;
  std::set<uint8_t*> open_;  // with room; the lowest first, so that others become empty
};

}  // namespace sparse_attn_host
