// A GPU block on one CPU thread: each of its threads is a fiber that runs until it waits for its block or its warp. Blocks run one
// after another. What tests gain from it: shared memory starts as NaN bytes and is checked for writes behind its end, fibers run
// forward and backward by turns so that a missing barrier shows, and threads that wait for each other for ever are a sentence.
#pragma once
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <type_traits>
#include <vector>

namespace SA_NAMESPACE::fibers {

constexpr size_t kStack = 128 * 1024, kFence = 256;
constexpr char kFenceByte = 0x5a;

struct Meeting {
  int arrived = 0;
  uint64_t number = 0;  // of the one that is being waited for
};

struct Warp : Meeting {
  // of this meeting and the next: a lane may be there while others still read
  const void* shown[2][32];
  alignas(16) char values[2][32][16];
};

class Block;
inline thread_local Block* now = nullptr;

class Block {
 public:
  int thread = 0, threads = 0, block[3] = {}, grid[3] = {};
  char* shared = nullptr;

  void meet_block() { meet(meeting_, threads - gone_); }
  void meet_warp() { meet(warps_[thread >> 5], 32); }

  const void* const* show_warp(const void* mine) {
    Warp& warp = warps_[thread >> 5];
    const auto shown = warp.shown[warp.number & 1];
    shown[thread & 31] = mine;
    meet(warp, 32);
    return shown;
  }

  // the value of another lane
  template <class T>
  T exchange(T mine, int lane) {
    static_assert(sizeof(T) <= 16 && std::is_trivially_copyable_v<T>);
    Warp& warp = warps_[thread >> 5];
    const auto values = warp.values[warp.number & 1];
    std::memcpy(values[thread & 31], &mine, sizeof(T));
    meet(warp, 32);
    std::memcpy(&mine, values[lane], sizeof(T));
    return mine;
  }

  // every block of a grid; null, or what went wrong
  template <class F>
  const char* run_all(int threads_of_block, size_t shared_bytes, const F& body) {
    prepare(threads_of_block);
    const auto memory = std::make_unique<char[]>(shared_bytes + kFence + 128);
    shared = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory.get()) + 127) & ~uintptr_t(127));
    call_ = [](const void* f) { (*static_cast<const F*>(f))(); };
    body_ = &body;
    for (block[2] = 0; block[2] < grid[2]; ++block[2])
      for (block[1] = 0; block[1] < grid[1]; ++block[1])
        for (block[0] = 0; block[0] < grid[0]; ++block[0]) {
          std::memset(shared, 0xff, shared_bytes);
          std::memset(shared + shared_bytes, kFenceByte, kFence);
          if (const char* fault = run_block()) {
            for (Fiber& fiber : fibers_) fiber.born = false;  // their stacks are in the middle of something
            return fault;
          }
          for (size_t i = 0; i < kFence; ++i)
            if (shared[shared_bytes + i] != kFenceByte) return "a kernel wrote behind its shared memory";
        }
    return nullptr;
  }

  ~Block() {
    if (stacks_) munmap(stacks_, fibers_.size() * kStack);
  }

 private:
  struct Fiber {
    bool born = false, done = true;
    ucontext_t start;
    jmp_buf at;
    const Meeting* waits = nullptr;
    uint64_t number = 0;
  };

  void prepare(int count) {
    threads = count;
    warps_.assign(count / 32, {});
    if (fibers_.size() >= size_t(count)) return;
    if (stacks_) munmap(stacks_, fibers_.size() * kStack);
    fibers_ = std::vector<Fiber>(count);
    void* stacks = mmap(nullptr, count * kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stacks == MAP_FAILED) fibers_.clear(), throw std::bad_alloc();
    stacks_ = static_cast<char*>(stacks);
  }

  const char* run_block() {
    gone_ = 0, meeting_ = {}, warps_.assign(warps_.size(), {});
    for (int i = 0; i < threads; ++i) fibers_[i].done = false, fibers_[i].waits = nullptr;
    for (bool forward = true; gone_ < threads; forward = !forward) {
      bool moved = false;
      for (int i = 0; i < threads; ++i) {
        thread = forward ? i : threads - 1 - i;
        Fiber& fiber = fibers_[thread];
        if (fiber.done || (fiber.waits && fiber.waits->number == fiber.number)) continue;
        moved = true;
        resume(fiber);
        if (!fiber.done) continue;
        ++gone_;
        // those that left count as arrived, as on a GPU
        if (meeting_.arrived && meeting_.arrived == threads - gone_) open(meeting_);
      }
      if (!moved) return "threads of a block wait for others that never come: a barrier or a warp word was not reached by all";
    }
    return nullptr;
  }

  static void open(Meeting& meeting) { meeting.arrived = 0, ++meeting.number; }

  void meet(Meeting& meeting, int all) {
    if (++meeting.arrived == all) return open(meeting);
    Fiber& fiber = fibers_[thread];
    fiber.waits = &meeting, fiber.number = meeting.number;
    leave(fiber);
  }

  // switching by setjmp costs no system call; ucontext is only there for a fiber's first step
  [[gnu::noinline]] void resume(Fiber& fiber) {
    if (_setjmp(back_)) return;
    if (fiber.born) _longjmp(fiber.at, 1);
    fiber.born = true;
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = stacks_ + (&fiber - fibers_.data()) * kStack;
    fiber.start.uc_stack.ss_size = kStack;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, &Block::live, 0);
    setcontext(&fiber.start);
  }

  [[gnu::noinline]] void leave(Fiber& fiber) {
    if (!_setjmp(fiber.at)) _longjmp(back_, 1);
  }

  // a fiber lives for many blocks
  static void live() {
    for (;;) {
      now->call_(now->body_);
      Fiber& fiber = now->fibers_[now->thread];
      fiber.done = true;
      now->leave(fiber);
    }
  }

  std::vector<Fiber> fibers_;
  char* stacks_ = nullptr;
  std::vector<Warp> warps_;
  Meeting meeting_;
  int gone_ = 0;
  jmp_buf back_;
  void (*call_)(const void*) = nullptr;
  const void* body_ = nullptr;
};

inline Block& mine() {
  thread_local Block block;
  return block;
}

// body() on every thread of every block; null, or what went wrong
template <class F>
const char* run(int x, int y, int z, int threads, int64_t shared_bytes, const F& body) {
  Block& block = mine();
  block.grid[0] = x, block.grid[1] = y, block.grid[2] = z;
  now = &block;
  return block.run_all(threads, shared_bytes, body);
}

}  // namespace SA_NAMESPACE::fibers
