// The tiers behind the device and the pages of all pools in them; see kvcache.tiers.Pools, whose twin in Python is plain.py.
//
// Two locks, taken in this order: ``writing_`` lets one thread write at a time, ``mutex_`` guards every table and is held for no copy
// and no transfer. A page that somebody reads or moves is ``busy`` and stays where it is until that ends, also when nobody holds it.
#pragma once
#include <unistd.h>

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "blocks.h"
#include "failure.h"
#include "file.h"

namespace sparse_attn_host {

class Pool;

struct Counts {
  int64_t pages = 0, bytes = 0, peak_bytes = 0, read_bytes = 0;
  void add(int64_t more_pages, int64_t more_bytes) {
    pages += more_pages;
    bytes += more_bytes;
    peak_bytes = bytes > peak_bytes ? bytes : peak_bytes;
  }
};

// One call of ``read``.
struct Job {
  Pool* pool;
  std::vector<Extent> extents;   // with a source: in memory; those on disk come behind, by their place
  std::vector<uint32_t> pages;   // of each extent
  int64_t left = 0;              // pieces
  std::optional<Failure> failure;
};

class Engine {
 public:
  // Limits in bytes, 0 without the tier.
  Engine(int64_t host, int64_t disk, const std::string& folder, int threads);
  ~Engine();

  // Is this the process that made it? A child has the file and the tables as well, but not the threads.
  bool own() const { return getpid() == process_; }
  void require_own() const {
    if (!own()) throw Failure("forked");
  }

  struct State {
    Counts host, disk;
    int64_t moved;
  };
  State counts();
  // Waits for the end of a job, and helps; throws what went wrong.
  void wait(Job& job);
  bool done(const Job& job);

 private:
  friend class Pool;
  struct Piece {
    std::shared_ptr<Job> job;
    size_t begin, end;
  };
  void start(std::shared_ptr<Job> job, std::unique_lock<std::mutex>& lock);  // with mutex_ held, which it may give back
  void run(const Piece& piece);
  void gather();

  const int64_t host_limit_;
  const int n_threads_;
  const pid_t process_ = getpid();
  std::unique_ptr<File> file_;
  std::mutex writing_, mutex_;
  std::condition_variable work_, changed_;
  std::deque<Piece> queue_;
  std::vector<std::thread> threads_;
  bool ending_ = false;
  uint64_t stamp_ = 0;  // of the last page written
  std::map<uint64_t, std::pair<Pool*, uint32_t>> in_memory_;  // stamp -> page, oldest first
  Counts host_, disk_;
  int64_t moved_ = 0;
};

class Pool {
 public:
  Pool(std::shared_ptr<Engine> engine, int64_t page_bytes) : engine_(std::move(engine)), size_(page_bytes), blocks_(page_bytes) {}
  // Its pages in memory are rows of one array that is page-locked.
  Pool(std::shared_ptr<Engine> engine, int64_t page_bytes, Locks locks);
  ~Pool() { close(); }

  void write(const uint8_t* pages, int64_t n, int64_t* ids);
  std::shared_ptr<Job> read(const int64_t* ids, const int64_t* slots, int64_t n, uint8_t* out, int64_t rows);
  void hold(const int64_t* ids, int64_t n);
  void release(const int64_t* ids, int64_t n);
  void close();

  // Where that array begins and how many pages it has room for; null and 0 without one.
  std::pair<uint8_t*, int64_t> array() const;
  // What kept some of it from being locked; 0 where nothing did, -1 where there is no array.
  int refusal();
  // Rows of pages in that array; -1 for those on disk.
  void rows(const int64_t* ids, int64_t n, int64_t* out);

  const std::shared_ptr<Engine>& engine() const { return engine_; }
  int64_t page_bytes() const { return size_; }

 private:
  friend class Engine;
  struct Page {
    int64_t held = 0;
    int32_t busy = 0;
    uint32_t generation = 0;    // how many pages had this number before
    uint8_t* memory = nullptr;  // null on disk
    int64_t place = -1;
    uint64_t stamp = 0, sum = 0;
  };
  struct Move {
    Pool* pool;
    uint32_t page;
  };
  // all of these with mutex_ held
  void require_open() const;
  uint32_t number(int64_t id) const;
  void drop(uint32_t page);
  void leave(uint32_t page);  // one busy less
  std::vector<Move> victims(int64_t need, std::vector<Extent>& extents) const;
  std::vector<uint8_t*> take_blocks(int64_t n);
  int64_t add(Page page);

  const std::shared_ptr<Engine> engine_;
  const int64_t size_;
  Blocks blocks_;
  std::vector<Page> pages_;
  std::vector<uint32_t> unused_;
  bool closed_ = false;
};

}  // namespace sparse_attn_host
