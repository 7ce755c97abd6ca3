#include "file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <optional>

namespace sparse_attn_host {
namespace {

// Memory that O_DIRECT may read into; one per thread, kept.
uint8_t* staging(int64_t bytes) {
  struct Free {
    void operator()(uint8_t* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<uint8_t, Free> memory;
  thread_local int64_t room = 0;
  if (room < bytes) {
    memory.reset(static_cast<uint8_t*>(std::aligned_alloc(kSector, bytes)));
    room = memory ? bytes : 0;
    if (!memory) throw Failure("no_memory", bytes, std::string(std::strerror(ENOMEM)));
  }
  return memory.get();
}

int open_unnamed(const std::string& folder) {
  for (int direct : {O_DIRECT, 0}) {
    int file = open(folder.c_str(), O_TMPFILE | O_EXCL | O_RDWR | O_CLOEXEC | direct, S_IRUSR | S_IWUSR);
    if (file >= 0) return file;
  }
  // a file system without nameless files
  std::string name = folder + "/.sparse_attn.XXXXXX";
  int file = mkostemp(name.data(), O_CLOEXEC);
  if (file < 0) throw Failure("no_file", folder, std::string(std::strerror(errno)));
  unlink(name.c_str());
  fcntl(file, F_SETFL, fcntl(file, F_GETFL) | O_DIRECT);
  return file;
}

}  // namespace

uint64_t checksum(const uint8_t* data, int64_t bytes) {
  constexpr int kLanes = 8;
  constexpr uint64_t kOdd = 0x9e3779b97f4a7c15, kOther = 0xd6e8feb86659fd93;
  uint64_t lanes[kLanes], words[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = (i + 1) * kOther;
  auto mix = [&](const uint8_t* from) {
    std::memcpy(words, from, sizeof words);
    for (int i = 0; i < kLanes; ++i) lanes[i] = std::rotl(lanes[i] ^ words[i], 29) * kOdd;
  };
  int64_t at = 0;
  for (; at + int64_t(sizeof words) <= bytes; at += sizeof words) mix(data + at);
  if (at < bytes) {
    uint8_t rest[sizeof words] = {};
    std::memcpy(rest, data + at, bytes - at);
    mix(rest);
  }
  uint64_t sum = bytes;
  for (uint64_t lane : lanes) {
    sum = std::rotl(sum ^ lane, 31) * kOther;
    sum ^= sum >> 32;
  }
  return sum;
}

File::File(const std::string& folder, int64_t limit) : folder_(folder), limit_(limit), file_(open_unnamed(folder)) {}

File::~File() { close(file_); }

int64_t File::take(int64_t bytes) {
  for (auto hole = holes_.begin(); hole != holes_.end(); ++hole) {
    auto [place, length] = *hole;
    if (length < bytes) continue;
    holes_.erase(hole);
    if (length > bytes) holes_.emplace(place + bytes, length - bytes);
    return place;
  }
  if (end_ + bytes > limit_) return -1;
  end_ += bytes;
  return end_ - bytes;
}

void File::reserve(std::vector<Extent>& extents, int64_t held) {
  int64_t need = 0;
  for (const Extent& extent : extents) need += padded(extent.bytes);
  size_t made = 0;
  auto undo = [&] {
    while (made-- > 0) free(extents[made].place, padded(extents[made].bytes));
  };
  for (; made < extents.size(); ++made) {
    extents[made].place = take(padded(extents[made].bytes));
    if (extents[made].place < 0) {
      undo();
      throw Failure("full", std::string("disk"), held, limit_, need);
    }
  }
  // a disk that is full says so here, before anything moves; a file system that cannot reserve says it when it is written
  if (end_ > allocated_) {
    int result;
    do {
      result = fallocate(file_, 0, allocated_, end_ - allocated_);
    } while (result != 0 && errno == EINTR);
    if (result != 0 && errno != EOPNOTSUPP && errno != ENOSYS) {
      std::string why = std::strerror(errno);
      undo();
      throw Failure("unwritten", folder_, why, need);
    }
    if (result == 0) allocated_ = end_;
  }
}

void File::free(int64_t place, int64_t bytes) {
  auto next = holes_.lower_bound(place);
  if (next != holes_.begin()) {
    auto before = std::prev(next);
    if (before->first + before->second == place) {
      place = before->first;
      bytes += before->second;
      holes_.erase(before);
    }
  }
  if (next != holes_.end() && place + bytes == next->first) {
    bytes += next->second;
    holes_.erase(next);
  }
  if (place + bytes < end_) {
    holes_.emplace(place, bytes);
    return;
  }
  end_ = place;
  if (end_ == 0 && ftruncate(file_, 0) == 0) allocated_ = 0;
}

// Calls until everything is transferred; bytes that were, errno says why not more.
template <class Call>
int64_t File::transfer(const Call& call, int64_t bytes) const {
  int64_t done = 0;
  errno = 0;
  while (done < bytes) {
    ssize_t some = call(done);
    if (some > 0) {
      done += some;
    } else if (some < 0 && errno == EINVAL && (fcntl(file_, F_GETFL) & O_DIRECT)) {
      fcntl(file_, F_SETFL, fcntl(file_, F_GETFL) & ~O_DIRECT);  // opened, but not served
      errno = 0;
    } else if (some == 0 || errno != EINTR) {
      break;
    }
  }
  return done;
}

void File::write(std::vector<Extent>& extents) const {
  int64_t need = 0, largest = kTransfer;
  for (const Extent& extent : extents) {
    need += padded(extent.bytes);
    largest = std::max(largest, padded(extent.bytes));
  }
  uint8_t* memory = staging(largest);
  for (size_t i = 0; i < extents.size();) {
    const int64_t begin = extents[i].place;
    int64_t filled = 0;
    for (; i < extents.size() && extents[i].place == begin + filled && filled + padded(extents[i].bytes) <= largest; ++i) {
      Extent& extent = extents[i];
      std::memcpy(memory + filled, extent.source, extent.bytes);
      std::memset(memory + filled + extent.bytes, 0, padded(extent.bytes) - extent.bytes);
      extent.sum = checksum(extent.source, extent.bytes);
      filled += padded(extent.bytes);
    }
    int64_t done = transfer([&](int64_t at) { return pwrite(file_, memory + at, filled - at, begin + at); }, filled);
    if (done < filled) throw Failure("unwritten", folder_, std::string(std::strerror(errno)), need);
  }
}

void File::read(const Extent* extents, int64_t n) const {
  const int64_t begin = extents[0].place, bytes = extents[n - 1].place + padded(extents[n - 1].bytes) - begin;
  uint8_t* memory = staging(std::max(bytes, kTransfer));
  int64_t done = transfer([&](int64_t at) { return pread(file_, memory + at, bytes - at, begin + at); }, bytes);
  const int error = errno;
  std::optional<Failure> failure;
  for (int64_t i = 0; i < n; ++i) {
    const Extent& extent = extents[i];
    const uint8_t* page = memory + (extent.place - begin);
    if (extent.place - begin + extent.bytes > done) {
      failure = error ? Failure("unreadable", folder_, std::string(std::strerror(error))) : Failure("truncated", folder_);
    } else if (checksum(page, extent.bytes) != extent.sum) {
      failure = Failure("altered", folder_);
    } else {
      std::memcpy(extent.target, page, extent.bytes);
    }
  }
  if (failure) throw *failure;
}

}  // namespace sparse_attn_host
