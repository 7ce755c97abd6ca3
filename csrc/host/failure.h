// What goes wrong, by the name of a function of kvcache/tiers/errors.py that makes the exception, and its arguments.
#pragma once
#include <cstdint>
#include <string>
#include <variant>
#include <vector>

namespace sparse_attn_host {

struct Failure {
  std::string name;
  std::vector<std::variant<int64_t, std::string>> arguments;

  template <class... Arguments>
  explicit Failure(std::string name_, Arguments... with) : name(std::move(name_)), arguments{with...} {}
};

}  // namespace sparse_attn_host
