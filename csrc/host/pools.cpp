#include "pools.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

namespace sparse_attn_host {
namespace {

// bytes in memory that one thread gathers at a time: a few microseconds
constexpr int64_t kPiece = 128 << 10;

int64_t memory_of_machine() { return int64_t(sysconf(_SC_PHYS_PAGES)) * sysconf(_SC_PAGESIZE); }

}  // namespace

// -- the engine ---------------------------------------------------------------------------------------------------------------

Engine::Engine(int64_t host, int64_t disk, const std::string& folder, int threads) : host_limit_(host), n_threads_(threads) {
  if (disk > 0) file_ = std::make_unique<File>(folder, disk);
}

Engine::~Engine() {
  {
    std::lock_guard lock(mutex_);
    ending_ = true;
  }
  work_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

Engine::State Engine::counts() {
  std::lock_guard lock(mutex_);
  return {host_, disk_, moved_};
}

void Engine::start(std::shared_ptr<Job> job, std::unique_lock<std::mutex>& lock) {
  const auto& extents = job->extents;
  std::vector<Piece> pieces;
  for (size_t begin = 0, end; begin < extents.size(); begin = end) {
    int64_t bytes = 0;
    const bool in_memory = extents[begin].source != nullptr;
    const int64_t most = in_memory ? kPiece : File::kTransfer;
    for (end = begin; end < extents.size() && (end == begin || bytes + padded(extents[end].bytes) <= most); ++end) {
      if ((extents[end].source != nullptr) != in_memory) break;
      if (!in_memory && extents[end].place != extents[begin].place + bytes) break;
      bytes += padded(extents[end].bytes);
    }
    pieces.push_back({job, begin, end});
  }
  job->left = pieces.size();
  if (pieces.size() == 1 && extents[0].source != nullptr) {
    lock.unlock();
    run(pieces[0]);  // sooner done than another thread is awake
    return;
  }
  queue_.insert(queue_.end(), pieces.begin(), pieces.end());
  while (threads_.size() < size_t(n_threads_)) threads_.emplace_back([this] { gather(); });
  work_.notify_all();
}

void Engine::gather() {
  std::unique_lock lock(mutex_);
  for (;;) {
    work_.wait(lock, [&] { return ending_ || !queue_.empty(); });
    if (queue_.empty()) return;
    Piece piece = std::move(queue_.front());
    queue_.pop_front();
    lock.unlock();
    run(piece);
    lock.lock();
  }
}

void Engine::run(const Piece& piece) {
  Job& job = *piece.job;
  std::optional<Failure> failure;
  if (job.extents[piece.begin].source != nullptr) {
    for (size_t i = piece.begin; i < piece.end; ++i) std::memcpy(job.extents[i].target, job.extents[i].source, job.extents[i].bytes);
  } else {
    try {
      file_->read(&job.extents[piece.begin], piece.end - piece.begin);
    } catch (const Failure& thrown) {
      failure = thrown;
    }
  }
  {
    std::lock_guard lock(mutex_);
    for (size_t i = piece.begin; i < piece.end; ++i) job.pool->leave(job.pages[i]);
    if (failure) job.failure = failure;
    --job.left;
  }
  changed_.notify_all();
}

void Engine::wait(Job& job) {
  require_own();
  std::unique_lock lock(mutex_);
  while (job.left > 0) {
    if (queue_.empty()) {
      changed_.wait(lock);
      continue;
    }
    Piece piece = std::move(queue_.front());
    queue_.pop_front();
    lock.unlock();
    run(piece);
    lock.lock();
  }
  if (job.failure) throw *job.failure;
}

bool Engine::done(const Job& job) {
  std::lock_guard lock(mutex_);
  return job.left == 0;
}

// -- the pages of a pool ------------------------------------------------------------------------------------------------------

Pool::Pool(std::shared_ptr<Engine> engine, int64_t page_bytes, Locks locks)
    : engine_(std::move(engine)), size_(page_bytes), blocks_(page_bytes, std::min(engine_->host_limit_, memory_of_machine()), locks) {}

std::pair<uint8_t*, int64_t> Pool::array() const {
  const Arena* arena = blocks_.arena();
  return arena ? std::pair(arena->base(), arena->bytes() / size_) : std::pair<uint8_t*, int64_t>(nullptr, 0);
}

int Pool::refusal() {
  std::lock_guard lock(engine_->mutex_);
  return blocks_.arena() ? blocks_.arena()->refusal() : -1;
}

void Pool::rows(const int64_t* ids, int64_t n, int64_t* out) {
  engine_->require_own();
  std::lock_guard lock(engine_->mutex_);
  require_open();
  for (int64_t i = 0; i < n; ++i) {
    const Page& page = pages_[number(ids[i])];
    out[i] = page.memory ? (page.memory - array().first) / size_ : -1;
  }
}

void Pool::require_open() const {
  if (closed_) throw Failure("closed");
}

uint32_t Pool::number(int64_t id) const {
  const uint32_t page = static_cast<uint32_t>(id);
  if (id < 0 || page >= pages_.size() || pages_[page].generation != id >> 32 || pages_[page].held == 0) throw Failure("not_held", id);
  return page;
}

int64_t Pool::add(Page page) {
  uint32_t at = pages_.size();
  if (unused_.empty()) {
    pages_.emplace_back();
  } else {
    at = unused_.back();
    unused_.pop_back();
  }
  page.held = 1;
  page.generation = pages_[at].generation;
  pages_[at] = page;
  if (page.memory) engine_->in_memory_.emplace_hint(engine_->in_memory_.end(), page.stamp, std::pair(this, at));
  return int64_t(page.generation) << 32 | at;
}

void Pool::drop(uint32_t at) {
  Page& page = pages_[at];
  if (page.memory) {
    blocks_.give(page.memory);
    engine_->in_memory_.erase(page.stamp);
    engine_->host_.add(-1, -size_);
  } else {
    engine_->file_->free(page.place, padded(size_));
    engine_->disk_.add(-1, -padded(size_));
  }
  const uint32_t generation = page.generation + 1;
  page = Page{};
  page.generation = generation & 0x7fffffff;  // ids stay above 0
  unused_.push_back(at);
}

void Pool::leave(uint32_t at) {
  if (--pages_[at].busy == 0 && pages_[at].held == 0) drop(at);
}

void Pool::hold(const int64_t* ids, int64_t n) {
  engine_->require_own();
  std::lock_guard lock(engine_->mutex_);
  require_open();
  for (int64_t i = 0; i < n; ++i) number(ids[i]);
  for (int64_t i = 0; i < n; ++i) ++pages_[number(ids[i])].held;
}

void Pool::release(const int64_t* ids, int64_t n) {
  engine_->require_own();
  std::lock_guard lock(engine_->mutex_);
  require_open();
  int64_t done = 0;
  try {
    for (; done < n; ++done) --pages_[number(ids[done])].held;
  } catch (const Failure&) {
    while (done-- > 0) ++pages_[static_cast<uint32_t>(ids[done])].held;
    throw;
  }
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t at = static_cast<uint32_t>(ids[i]);
    const Page& page = pages_[at];
    // named twice, it is gone by the second time
    if (page.generation == ids[i] >> 32 && page.held == 0 && page.busy == 0) drop(at);
  }
}

void Pool::close() {
  if (!engine_->own()) return;
  std::lock_guard writing(engine_->writing_);
  std::unique_lock lock(engine_->mutex_);
  if (closed_) return;
  closed_ = true;
  for (uint32_t at = 0; at < pages_.size(); ++at) {
    if (pages_[at].held == 0) continue;
    pages_[at].held = 0;
    if (pages_[at].busy == 0) drop(at);
  }
  engine_->changed_.wait(lock, [&] { return unused_.size() == pages_.size(); });
}

// -- writing ------------------------------------------------------------------------------------------------------------------

// The oldest pages in memory, as many as have to go before ``need`` bytes fit.
std::vector<Pool::Move> Pool::victims(int64_t need, std::vector<Extent>& extents) const {
  std::vector<Move> moves;
  int64_t held = engine_->host_.bytes;
  for (auto page = engine_->in_memory_.begin(); page != engine_->in_memory_.end() && held + need > engine_->host_limit_; ++page) {
    auto [pool, at] = page->second;
    moves.push_back({pool, at});
    extents.push_back({pool->pages_[at].memory, nullptr, pool->size_, -1, 0});
    held -= pool->size_;
  }
  return moves;
}

std::vector<uint8_t*> Pool::take_blocks(int64_t n) {
  std::vector<uint8_t*> blocks;
  while (int64_t(blocks.size()) < n) {
    uint8_t* block = blocks_.take();
    if (!block) {
      for (uint8_t* taken : blocks) blocks_.give(taken);
      throw Failure("no_memory", n * size_, std::string(std::strerror(ENOMEM)));
    }
    blocks.push_back(block);
  }
  return blocks;
}

void Pool::write(const uint8_t* from, int64_t n, int64_t* ids) {
  Engine& engine = *engine_;
  engine.require_own();
  std::lock_guard writing(engine.writing_);
  std::unique_lock lock(engine.mutex_);
  require_open();
  const int64_t staying = std::min(n, engine.host_limit_ / size_), direct = n - staying;
  std::vector<Extent> extents;
  const std::vector<Move> moves = victims(staying * size_, extents);
  const uint64_t first = engine.stamp_ + 1;
  engine.stamp_ += n;
  // more than memory ever takes goes down at once
  for (int64_t i = 0; i < direct; ++i) extents.push_back({from + i * size_, nullptr, size_, -1, 0});

  if (!extents.empty()) {
    if (!engine.file_) throw Failure("full", std::string("host"), engine.host_.bytes, engine.host_limit_, n * size_);
    engine.file_->reserve(extents, engine.disk_.bytes);
    for (auto [pool, at] : moves) ++pool->pages_[at].busy;
    lock.unlock();
    try {
      engine.file_->write(extents);
    } catch (const Failure&) {
      lock.lock();
      for (const Extent& extent : extents) engine.file_->free(extent.place, padded(extent.bytes));
      for (auto [pool, at] : moves) pool->leave(at);
      lock.unlock();
      engine.changed_.notify_all();
      throw;
    }
    lock.lock();
    for (size_t i = 0; i < moves.size(); ++i) {
      auto [pool, at] = moves[i];
      // who still reads it from memory ends first
      engine.changed_.wait(lock, [&, pool = pool, at = at] { return pool->pages_[at].busy == 1; });
      Page& page = pool->pages_[at];
      pool->blocks_.give(page.memory);
      engine.in_memory_.erase(page.stamp);
      page.memory = nullptr;
      page.place = extents[i].place;
      page.sum = extents[i].sum;
      engine.host_.add(-1, -pool->size_);
      engine.disk_.add(1, padded(pool->size_));
      ++engine.moved_;
      pool->leave(at);
    }
    engine.changed_.notify_all();
  }

  std::vector<uint8_t*> blocks;
  try {
    blocks = take_blocks(staying);
  } catch (const Failure&) {
    for (size_t i = moves.size(); i < extents.size(); ++i) engine.file_->free(extents[i].place, padded(size_));
    throw;
  }
  engine.host_.add(staying, staying * size_);
  engine.disk_.add(direct, direct * padded(size_));
  lock.unlock();
  for (int64_t i = 0; i < staying; ++i) std::memcpy(blocks[i], from + (direct + i) * size_, size_);
  lock.lock();
  for (int64_t i = 0; i < n; ++i) {
    Page page;
    page.stamp = first + i;
    if (i < direct) {
      page.place = extents[moves.size() + i].place;
      page.sum = extents[moves.size() + i].sum;
    } else {
      page.memory = blocks[i - direct];
    }
    ids[i] = add(page);
  }
}

// -- reading ------------------------------------------------------------------------------------------------------------------

std::shared_ptr<Job> Pool::read(const int64_t* ids, const int64_t* slots, int64_t n, uint8_t* out, int64_t rows) {
  engine_->require_own();
  std::vector<bool> taken(rows);
  for (int64_t i = 0; i < n; ++i) {
    if (slots[i] < 0 || slots[i] >= rows) throw Failure("no_row", slots[i], rows);
    if (taken[slots[i]]) throw Failure("same_row");
    taken[slots[i]] = true;
  }
  auto job = std::make_shared<Job>();
  job->pool = this;
  std::unique_lock lock(engine_->mutex_);
  require_open();
  std::vector<std::pair<int64_t, int64_t>> order;  // place, which of the ids; -1 in memory
  order.reserve(n);
  for (int64_t i = 0; i < n; ++i) {
    const Page& page = pages_[number(ids[i])];
    order.emplace_back(page.memory ? -1 : page.place, i);
  }
  std::sort(order.begin(), order.end());
  job->extents.reserve(n);
  job->pages.reserve(n);
  for (auto [place, i] : order) {
    const uint32_t at = static_cast<uint32_t>(ids[i]);
    Page& page = pages_[at];
    ++page.busy;
    job->extents.push_back({page.memory, out + slots[i] * size_, size_, page.place, page.sum});
    job->pages.push_back(at);
    (page.memory ? engine_->host_ : engine_->disk_).read_bytes += page.memory ? size_ : padded(size_);
  }
  engine_->start(job, lock);
  return job;
}

}  // namespace sparse_attn_host
