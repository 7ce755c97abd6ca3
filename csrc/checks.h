// SA_CHECK(condition, "what was wrong, got ", value, "; what to do"): the sentence reaches Python as a ContractError.
#pragma once
#include <sstream>
#include <stdexcept>

namespace SA_NAMESPACE {

template <class... Parts>
[[noreturn, gnu::cold, gnu::noinline]] void fail(const Parts&... parts) {
  std::ostringstream sentence;
  (sentence << ... << parts);
  throw std::invalid_argument(sentence.str());
}

}  // namespace SA_NAMESPACE

#define SA_CHECK(condition, ...) \
  do {                           \
    if (__builtin_expect(!(condition), 0)) ::SA_NAMESPACE::fail(__VA_ARGS__); \
  } while (0)
