// A file without a name that holds extents, multiples of 4 KiB each; every page in it has a checksum that is kept in memory.
#pragma once
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "failure.h"

namespace sparse_attn_host {

constexpr int64_t kSector = 4096;

inline int64_t padded(int64_t bytes) { return (bytes + kSector - 1) / kSector * kSector; }

// A change of any one 8-byte word always changes it.
uint64_t checksum(const uint8_t* data, int64_t bytes);

// A page on its way to the file, or from it.
struct Extent {
  const uint8_t* source;  // of a write
  uint8_t* target;        // of a read
  int64_t bytes, place;
  uint64_t sum;
};

// ``reserve`` and ``free`` must not run at the same time; everything else may.
class File {
 public:
  File(const std::string& folder, int64_t limit);
  File(const File&) = delete;
  ~File();

  // Gives every extent its place, all of them or, with an exception, none.
  void reserve(std::vector<Extent>& extents, int64_t held);
  void free(int64_t place, int64_t bytes);

  // Writes extents and gives each its checksum.
  void write(std::vector<Extent>& extents) const;
  // Reads extents that lie one behind the other, kTransfer bytes at most unless there is only one; throws if one is not what was
  // written, the others are in their targets then.
  void read(const Extent* extents, int64_t n) const;

  static constexpr int64_t kTransfer = 256 << 10;

 private:
  int64_t take(int64_t bytes);
  template <class Call>
  int64_t transfer(const Call& call, int64_t bytes) const;

  const std::string folder_;
  const int64_t limit_;
  int file_ = -1;
  int64_t end_ = 0, allocated_ = 0;
  std::map<int64_t, int64_t> holes_;  // place -> bytes, never two that touch
};

}  // namespace sparse_attn_host
