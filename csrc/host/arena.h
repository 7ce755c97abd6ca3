// Addresses reserved at once and given memory slab by slab, so that all of it is one array, whose slabs are page-locked for a GPU.
#pragma once
#include <sys/mman.h>

#include <cstdint>
#include <vector>

namespace sparse_attn_host {

// C functions that return 0 for success. Those of CUDA know no size to unlock, those of the system no flags; both leave such an
// argument alone.
struct Locks {
  int (*lock)(void* base, size_t bytes, unsigned flags) = nullptr;
  int (*unlock)(void* base, size_t bytes) = nullptr;
  static constexpr unsigned kFlags = 3;  // cudaHostRegisterPortable and Mapped: for every device of the process, to read itself
};

class Arena {
 public:
  Arena(int64_t slabs, int64_t slab_bytes, Locks locks) : bytes_(slab_bytes), locks_(locks), slabs_(slabs, kNone) {
    void* base = mmap(nullptr, slabs * slab_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base != MAP_FAILED) base_ = static_cast<uint8_t*>(base);
  }
  Arena(const Arena&) = delete;
  ~Arena() {
    if (!base_) return;
    for (size_t i = 0; i < slabs_.size(); ++i) {
      if (slabs_[i] == kLocked) locks_.unlock(base_ + i * bytes_, bytes_);
    }
    munmap(base_, slabs_.size() * bytes_);
  }

  // Null where the system has not that many addresses.
  uint8_t* base() const { return base_; }
  int64_t bytes() const { return int64_t(slabs_.size()) * bytes_; }
  // What the first slab that could not be locked was told; 0 while all are.
  int refusal() const { return refusal_; }

  // The lowest slab that is not taken; null when the system has no memory.
  uint8_t* take() {
    size_t i = 0;
    while (i < slabs_.size() && slabs_[i] != kNone) ++i;
    uint8_t* slab = base_ + i * bytes_;
    if (i == slabs_.size() || mprotect(slab, bytes_, PROT_READ | PROT_WRITE) != 0) return nullptr;
    slabs_[i] = kPlain;
    if (refusal_ == 0) refusal_ = locks_.lock(slab, bytes_, Locks::kFlags);
    if (refusal_ == 0) slabs_[i] = kLocked;
    return slab;
  }

  void give(uint8_t* slab) {
    State& state = slabs_[(slab - base_) / bytes_];
    if (state == kLocked) locks_.unlock(slab, bytes_);
    state = kNone;
    madvise(slab, bytes_, MADV_DONTNEED);
    mprotect(slab, bytes_, PROT_NONE);
  }

 private:
  enum State : uint8_t { kNone, kPlain, kLocked };
  const int64_t bytes_;
  const Locks locks_;
  std::vector<State> slabs_;
  uint8_t* base_ = nullptr;
  int refusal_ = 0;
};

}  // namespace sparse_attn_host
