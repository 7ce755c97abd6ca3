// Blocks of one size in slabs of anonymous memory: growing copies nothing, and an empty slab goes back to the system.
#pragma once
#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <set>
#include <vector>

namespace sparse_attn_host {

class Blocks {
 public:
  explicit Blocks(int64_t block) : block_(block), per_slab_(std::max<int64_t>(kSlab / block, 1)) {}
  Blocks(const Blocks&) = delete;
  ~Blocks() {
    for (auto& [base, slab] : slabs_) munmap(base, per_slab_ * block_);
  }

  // Null when the system has no memory.
  uint8_t* take() {
    if (open_.empty()) {
      void* base = mmap(nullptr, per_slab_ * block_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (base == MAP_FAILED) return nullptr;
      slabs_.emplace(static_cast<uint8_t*>(base), Slab{});
      open_.insert(static_cast<uint8_t*>(base));
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
    if (--slab.used == 0) {
      open_.erase(base);
      munmap(base, per_slab_ * block_);
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
  static constexpr int64_t kSlab = 4 << 20;
  const int64_t block_, per_slab_;
  std::map<uint8_t*, Slab> slabs_;
  std::set<uint8_t*> open_;  // with room; the lowest first, so that others become empty
};

}  // namespace sparse_attn_host
